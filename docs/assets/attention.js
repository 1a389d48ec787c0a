// Click a patch of the photo: where does it look? A panel for weights of any network: layers have
// stage, block, grid, keys, heads, cls, and weights (heads, queries, keys) without the cls token's.
function attentionPanel({ photo, side, layers, point = [0.55, 0.5] }) {
  const panel = document.createElement("div");
  panel.className = "panel";
  panel.innerHTML = `
    <div class="controls">
      <label>Stage and block <select autocomplete="off" class="layer">${layers.map((l, k) =>
        `<option value="${k}">stage ${l.stage}, block ${l.block}</option>`).join("")}</select></label>
      <label>Head <select autocomplete="off" class="head"></select></label>
      <label>Query's row <input type="range" autocomplete="off" class="row" min="0"><output></output></label>
      <label>Query's column <input type="range" autocomplete="off" class="column" min="0"><output></output></label>
    </div>
    <svg viewBox="0 0 ${side} ${side}" class="photo" role="img"></svg>
    <p class="words" aria-live="polite"></p>`;
  const [layerBox, headBox, row, column] = ["layer", "head", "row", "column"].map((c) => panel.querySelector("." + c));
  const svg = panel.querySelector("svg");
  // the query as a fraction of the image, so that another stage keeps the place
  let place = point;

  function weightsOf(layer, head, query) {
    const m = layer.keys[0] * layer.keys[1], n = layer.grid[0] * layer.grid[1];
    const heads = head < 0 ? [...Array(layer.heads).keys()] : [head];
    return Array.from({ length: m }, (_, key) =>
      heads.reduce((sum, h) => sum + layer.weights[(h * n + query) * m + key], 0) / heads.length);
  }

  function enter() {
    const layer = layers[layerBox.value];
    headBox.innerHTML = (layer.heads > 1 ? `<option value="-1">mean of ${layer.heads}</option>` : "") +
      Array.from({ length: layer.heads }, (_, h) => `<option value="${h}">${h}</option>`).join("");
    row.max = layer.grid[0] - 1;
    column.max = layer.grid[1] - 1;
    row.value = Math.floor(place[0] * layer.grid[0]);
    column.value = Math.floor(place[1] * layer.grid[1]);
    draw();
  }

  function draw() {
    const layer = layers[layerBox.value], [H, W] = layer.grid, [h, w] = layer.keys;
    const r = Number(row.value), c = Number(column.value);
    row.nextElementSibling.value = r;
    column.nextElementSibling.value = c;
    const weights = weightsOf(layer, Number(headBox.value), r * W + c);
    const best = weights.indexOf(Math.max(...weights));
    const high = side / h, wide = side / w, token = [side / H, side / W];
    svg.innerHTML = `<image href="${photo}" width="${side}" height="${side}"/>` +
      weights.map((weight, key) => `<rect x="${(key % w) * wide}" y="${Math.floor(key / w) * high}" width="${wide}"
        height="${high}" fill="#000" opacity="${(0.85 * (1 - weight / weights[best])).toFixed(3)}"/>`).join("") +
      `<rect x="${c * token[1]}" y="${r * token[0]}" width="${token[1]}" height="${token[0]}" class="query"/>`;
    const sum = weights.reduce((a, b) => a + b, 0);
    const words = `The query at row ${r}, column ${c} of ${H}×${W} looks most at key row ${Math.floor(best / w)}, ` +
      `column ${best % w} of ${h}×${w}, with weight ${weights[best].toFixed(4)}. ` +
      `All alike would be ${(1 / (weights.length + layer.cls)).toFixed(4)}.` +
      (layer.cls ? ` The cls token gets ${Math.max(1 - sum, 0).toFixed(4)}.` : "");
    panel.querySelector(".words").textContent = words;
    svg.setAttribute("aria-label", "The photo, darkened where the query does not look. " + words);
  }

  function moveTo(event) {
    const box = svg.getBoundingClientRect();
    const inside = (x) => Math.min(Math.max(x, 0), 0.9999);
    place = [inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)];
    const { grid } = layers[layerBox.value];
    row.value = Math.floor(place[0] * grid[0]);
    column.value = Math.floor(place[1] * grid[1]);
    draw();
  }

  function moved() {
    const { grid } = layers[layerBox.value];
    place = [(Number(row.value) + 0.5) / grid[0], (Number(column.value) + 0.5) / grid[1]];
    draw();
  }

  svg.addEventListener("click", moveTo);
  layerBox.addEventListener("change", enter);
  headBox.addEventListener("change", draw);
  row.addEventListener("input", moved);
  column.addEventListener("input", moved);
  enter();
  return panel;
}

// The figure of a page, whose weights are those of attention_maps, in 65535 steps.
(function () {
  const root = document.getElementById("attention");
  if (!root) return;
  const figure = JSON.parse(root.querySelector("script").textContent);
  for (const element of root.querySelectorAll(".drawn, img")) element.hidden = true;
  for (const layer of figure.layers) {
    const bytes = Uint8Array.from(atob(layer.weights), (c) => c.charCodeAt(0));
    layer.weights = Float64Array.from(new Uint16Array(bytes.buffer), (step) => (step / 65535) * layer.top);
  }
  root.prepend(attentionPanel(figure));
})();
