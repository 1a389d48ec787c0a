// Runs the networks of the package in the page, by ONNX Runtime, on the page's photo or the reader's.
// Until somebody asks for it, nothing is fetched, and the figures are those made with the page.
(function () {
  const root = document.getElementById("try");
  if (!root) return;
  const site = new URL("..", document.currentScript.src);
  const { photo, runtime, networks, side, classes, blocks, point, street, kinds, colours, opacity } =
    JSON.parse(root.querySelector("script").textContent);
  const address = (name) => new URL(name, site).href;
  const MOST_PIXELS = 5e7; // of a photo: a canvas holds four bytes for each

  const panel = document.createElement("div");
  panel.className = "panel";
  panel.innerHTML = `
    <div class="controls">
      <button type="button">Run on the temple</button>
      <label>Run on a photo of yours <input type="file" accept="image/*" autocomplete="off"></label>
      <span class="place">or drop one here</span>
    </div>
    <p class="words" aria-live="polite"></p>`;
  root.prepend(panel);
  const button = panel.querySelector("button"), chooser = panel.querySelector("input");
  const say = (words) => (panel.querySelector(".words").textContent = words);

  if (location.protocol === "file:") {
    button.disabled = chooser.disabled = true;
    say("This page was opened as a file, and browsers let such a page read no other file, so the networks cannot be " +
      "fetched. To run them here, serve the folder, python -m http.server --directory site, and open " +
      "http://localhost:8000/try.html. The figures below were made with the page.");
    return;
  }

  // Pictures ----------------------------------------------------------------------------------------

  // A picture is { width, height, data }, red, green and blue of each pixel in turn, 0 to 255.
  async function decoded(blob) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    } catch {
      throw new Error("this browser cannot open it as a picture. Try a JPEG or a PNG");
    }
    const { width, height } = bitmap;
    if (width * height > MOST_PIXELS) throw new Error(`it has ${width}×${height} pixels, and ${MOST_PIXELS / 1e6} million are the most`);
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const brush = canvas.getContext("2d", { willReadFrequently: true });
    brush.fillStyle = "white"; // behind what is transparent
    brush.fillRect(0, 0, width, height);
    brush.drawImage(bitmap, 0, 0);
    bitmap.close();
    const given = brush.getImageData(0, 0, width, height).data;
    const data = new Uint8Array(3 * width * height);
    for (let i = 0, k = 0; k < data.length; i += 4) {
      data[k++] = given[i];
      data[k++] = given[i + 1];
      data[k++] = given[i + 2];
    }
    return { width, height, data };
  }

  const BILINEAR = { support: 1, at: (x) => Math.max(1 - Math.abs(x), 0) };
  const BICUBIC = {
    support: 2,
    at(x) {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  };

  // Pillow's resampling, to the bit: antialiased, weights in units of 2^-22, one axis after the other.
  // Of the new size only count pixels from first on are computed.
  function weightsOf(from, to, first, count, filter) {
    const scale = from / to, wide = Math.max(scale, 1), reach = filter.support * wide;
    return Array.from({ length: count }, (_, k) => {
      const center = (first + k + 0.5) * scale;
      const start = Math.max(Math.trunc(center - reach + 0.5), 0);
      const end = Math.min(Math.trunc(center + reach + 0.5), from);
      const w = Array.from({ length: end - start }, (_, i) => filter.at((i + start - center + 0.5) * (1 / wide)));
      const sum = w.reduce((a, b) => a + b, 0);
      return { start, w: w.map((x) => Math.trunc((x / sum) * 2 ** 22 + (x / sum < 0 ? -0.5 : 0.5))) };
    });
  }

  function resampled({ width, height, data }, across, taps) {
    const shape = across ? [taps.length, height] : [width, taps.length];
    const result = new Uint8ClampedArray(3 * shape[0] * shape[1]);
    const step = across ? 3 : 3 * width; // from a pixel to the next one along the axis
    let at = 0;
    for (let y = 0; y < shape[1]; y++)
      for (let x = 0; x < shape[0]; x++) {
        const { start, w } = taps[across ? x : y];
        const origin = (across ? 3 * y * width : 3 * x) + start * step;
        for (let c = 0; c < 3; c++) {
          let sum = 2 ** 21;
          for (let i = 0; i < w.length; i++) sum += data[origin + c + i * step] * w[i];
          result[at++] = sum >> 22;
        }
      }
    return { width: shape[0], height: shape[1], data: result };
  }

  // The picture at width x height, of which the part from left and top on is cut out.
  function resized(picture, width, height, filter, left = 0, top = 0, W = width, H = height) {
    const along = (from, to, first, count, across) => {
      if (from === to && first === 0 && count === to) return;
      const taps = from === to ? Array.from({ length: count }, (_, k) => ({ start: first + k, w: [2 ** 22] }))
        : weightsOf(from, to, first, count, filter);
      picture = resampled(picture, across, taps);
    };
    along(picture.width, width, left, W, true);
    along(picture.height, height, top, H, false);
    return picture;
  }

  const halved = (n) => (n % 2 ? 2 * Math.round(n / 4) : n / 2); // halves to even, as Python rounds

  // As Preprocessing: the short side with a margin, then the middle.
  function square(picture) {
    const short = Math.floor((side * 256) / 224);
    const { width, height } = picture, least = Math.min(width, height);
    const [w, h] = [width, height].map((n) => Math.floor((short * n) / least));
    return resized(picture, w, h, BICUBIC, halved(w - side), halved(h - side), side, side);
  }

  // The middle, as wide for its height as a frame of CamVid, and at that network's size.
  function middle(picture) {
    const [H, W] = street, { width, height } = picture;
    const wide = Math.min(width, Math.floor((height * W) / H)), high = Math.min(height, Math.floor((width * H) / W));
    const left = Math.floor((width - wide) / 2), top = Math.floor((height - high) / 2);
    const cut = resized(picture, width, height, BILINEAR, left, top, wide, high);
    return resized(cut, W, H, BILINEAR);
  }

  function painted({ width, height, data }) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [width, height];
    const image = new ImageData(width, height);
    for (let k = 0; k < width * height; k++) image.data.set([data[3 * k], data[3 * k + 1], data[3 * k + 2], 255], 4 * k);
    canvas.getContext("2d").putImageData(image, 0, 0);
    canvas.setAttribute("role", "img");
    return canvas;
  }

  // Networks ----------------------------------------------------------------------------------------

  async function fetched(name, count, signal) {
    const answer = await fetch(address(name), { signal });
    if (!answer.ok) throw new Error(`${name} could not be fetched (status ${answer.status})`);
    const parts = [];
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      parts.push(value);
      count(value.length);
    }
    return new Uint8Array(await new Blob(parts).arrayBuffer());
  }

  let loading = null; // once for all photos
  async function load() {
    let bytes = 0, told = 0;
    const count = (more) => {
      bytes += more;
      if (bytes - told > 4e6) say(`Fetched ${((told = bytes) / 1e6).toFixed(0)} MB of this site ...`);
    };
    const stop = new AbortController(); // if one fails, the others are not waited for
    const [ort, wasm, ...files] = await Promise.all([
      import(address(runtime[0])),
      ...[runtime[1], ...networks].map((name) => fetched(name, count, stop.signal)),
    ]).finally(() => stop.abort());
    ort.env.wasm.numThreads = 1; // more need headers that a server of plain files does not send
    ort.env.wasm.proxy = true; // in a worker, so that the page can be used meanwhile
    ort.env.wasm.wasmBinary = wasm;
    say("Preparing the networks ...");
    const sessions = [];
    for (const file of files) sessions.push(await ort.InferenceSession.create(file, { executionProviders: ["wasm"] }));
    return async (session, { width, height, data }) => {
      const pixels = new ort.Tensor("uint8", Uint8Array.from(data), [1, height, width, 3]); // goes to the worker
      return sessions[session].run({ pixels });
    };
  }

  // What is shown -----------------------------------------------------------------------------------

  function place(name, content) {
    const part = document.getElementById(`try-${name}`);
    part.querySelector(".made").hidden = true;
    part.querySelector(".panel")?.remove();
    part.prepend(content);
  }

  function framed(...content) {
    const frame = document.createElement("div");
    frame.className = "panel";
    frame.append(...content);
    return frame;
  }

  function paragraph(words) {
    const p = document.createElement("p");
    p.className = "legend";
    p.textContent = words;
    return p;
  }

  function table(heading, rows) {
    const made = document.createElement("table");
    made.innerHTML = `<thead><tr>${heading.map((h) => `<th scope="col">${h}</th>`).join("")}</tr></thead>
      <tbody>${rows.map((row) => `<tr>${row.map((x) => `<td>${x}</td>`).join("")}</tr>`).join("")}</tbody>`;
    return made;
  }

  const byNumber = (x) => [...x.keys()].sort((a, b) => x[b] - x[a] || a - b);

  function showClasses(logits) {
    const most = Math.max(...logits), e = Array.from(logits, (x) => Math.exp(x - most));
    const sum = e.reduce((a, b) => a + b, 0), p = e.map((x) => x / sum);
    place("classes", framed(table(["class", "probability"], byNumber(p).map((k) => [classes[k], p[k].toFixed(4)]))));
    return classes[byNumber(p)[0]];
  }

  // A map (C, h, w): the three channels that vary most, as red, green and blue.
  function mapPicture({ dims: [, C, height, width], data }) {
    const n = height * width;
    const channels = Array.from({ length: C }, (_, c) => data.subarray(c * n, (c + 1) * n));
    const variance = channels.map((x) => {
      const mean = x.reduce((a, b) => a + b, 0) / n;
      return x.reduce((a, b) => a + (b - mean) ** 2, 0) / n;
    });
    const best = byNumber(variance).slice(0, 3), pixels = new Uint8ClampedArray(3 * n);
    best.forEach((c, k) => {
      const low = Math.min(...channels[c]), range = Math.max(...channels[c]) - low || 1;
      for (let i = 0; i < n; i++) pixels[3 * i + k] = (255 * (channels[c][i] - low)) / range;
    });
    return [painted({ width, height, data: pixels }), best];
  }

  function showMaps(seen, maps) {
    const row = document.createElement("div");
    row.className = "pictures";
    const add = (canvas, words) => {
      const figure = document.createElement("div"), below = paragraph(words);
      canvas.setAttribute("aria-label", words);
      figure.append(canvas, below);
      row.append(figure);
    };
    add(painted(seen), `The photo, ${side}×${side} pixels`);
    maps.forEach((map, k) => {
      const [canvas, best] = mapPicture(map), [, C, h, w] = map.dims;
      add(canvas, `F${k + 1}: ${h}×${w} cells, ${C} channels; ${best.join(", ")} vary most`);
    });
    place("maps", framed(row));
  }

  // Attention of the blocks without the rows and columns of the cls token.
  function layersOf(outputs) {
    return blocks.map((block) => {
      const { dims: [, N, n, m], data } = outputs[`A${block.stage}.${block.block}`];
      const { cls } = block, weights = new Float32Array(N * (n - cls) * (m - cls));
      let at = 0;
      for (let h = 0; h < N; h++)
        for (let q = cls; q < n; q++) {
          const start = (h * n + q) * m;
          weights.set(data.subarray(start + cls, start + m), at);
          at += m - cls;
        }
      return { ...block, weights };
    });
  }

  function showSegmentation(seen, logits) {
    const [H, W] = street, n = H * W, K = kinds.length, shares = new Array(K).fill(0);
    const rgb = colours.map((colour) => colour.match(/\d+/g).map(Number)), data = new Uint8ClampedArray(3 * n);
    for (let i = 0; i < n; i++) {
      let best = 0;
      for (let k = 1; k < K; k++) if (logits[k * n + i] > logits[best * n + i]) best = k;
      shares[best] += 1 / n;
      for (let c = 0; c < 3; c++) data[3 * i + c] = (1 - opacity) * seen.data[3 * i + c] + opacity * rgb[best][c];
    }
    const order = byNumber(shares).filter((k) => shares[k]);
    const percent = (k) => `${(100 * shares[k]).toFixed(1)}%`;
    const picture = painted({ width: W, height: H, data });
    picture.setAttribute("aria-label", "The photo, tinted by class: " + order.map((k) => `${kinds[k]} ${percent(k)}`).join(", "));
    place("segmentation", framed(picture, table(["class", "share of the pixels"],
      order.map((k) => [`<span class="swatch" style="background: ${colours[k]}"></span>${kinds[k]}`, percent(k)]))));
    return kinds[order[0]];
  }

  // What happens ------------------------------------------------------------------------------------

  const breath = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  let busy = false;

  async function run(name, getBlob) {
    if (busy) return;
    busy = true; // the controls stay as they are: a disabled one would lose the focus
    try {
      say(`Opening ${name} ...`);
      const picture = await decoded(await getBlob());
      if (!loading) say("Fetching the runtime and the networks from this site ...");
      const answer = await (loading ??= load().catch((error) => {
        loading = null; // to be tried again
        throw error;
      }));
      say(`Running on ${name} ...`);
      await breath(); // or the words would be seen too late
      const start = performance.now();
      const pixels = [square(picture), middle(picture)];
      const classified = await answer(0, pixels[0]), segmented = await answer(1, pixels[1]);
      const seconds = (performance.now() - start) / 1000;
      const likeliest = showClasses(classified.logits.data);
      showMaps(pixels[0], [1, 2, 3, 4].map((i) => classified[`F${i}`]));
      place("attention", attentionPanel({ photo: painted(pixels[0]).toDataURL(), side, layers: layersOf(classified), point }));
      const largest = showSegmentation(pixels[1], segmented.logits.data);
      root.answers = { picture, pixels, classified, segmented }; // for a console, and for the test
      say(`Both networks ran on ${name} in ${seconds.toFixed(1)} seconds, in this page. The likeliest of the ten classes: ` +
        `${likeliest}. The class of street scenes that covers most of it: ${largest}. All figures below are of this run.`);
    } catch (error) {
      say(`${name}: ${error.message}. The figures below are as they were.`);
    } finally {
      busy = false;
    }
  }

  const runOn = (file) => file && run(file.name, () => file);
  button.addEventListener("click", () => run("the temple", async () => {
    const answer = await fetch(address(photo));
    if (!answer.ok) throw new Error(`${photo} could not be fetched (status ${answer.status})`);
    return answer.blob();
  }));
  chooser.addEventListener("change", () => {
    runOn(chooser.files[0]);
    chooser.value = ""; // so that the same file can be chosen again
  });
  panel.addEventListener("dragover", (event) => {
    event.preventDefault();
    panel.classList.add("over");
  });
  panel.addEventListener("dragleave", () => panel.classList.remove("over"));
  panel.addEventListener("drop", (event) => {
    event.preventDefault();
    panel.classList.remove("over");
    runOn(event.dataTransfer.files[0]);
  });
})();
