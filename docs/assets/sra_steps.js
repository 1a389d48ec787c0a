// Steps through the shapes of SRA, stage by stage. The table below stays and shows where one is.
(function () {
  const ROOM = { top: 30, rows: 190, columns: 262, height: 240 };
  const root = document.getElementById("sra-steps");
  if (!root) return;
  const { steps, R, N } = JSON.parse(root.querySelector("script").textContent);
  const table = root.querySelector("table");
  const panel = document.createElement("div");
  panel.className = "panel";
  panel.innerHTML = `
    <div class="controls">
      <label>Stage <select autocomplete="off">${R.map(
        (r, i) => `<option value="${i}">${i + 1} (R = ${r}, ${N[i]} head${N[i] > 1 ? "s" : ""})</option>`
      ).join("")}</select></label>
      <button type="button" class="back">← Back</button>
      <button type="button" class="on">Next →</button>
      <span class="place"></span>
    </div>
    <p class="words" aria-live="polite"></p>
    <svg viewBox="0 0 360 ${ROOM.height}" role="img"></svg>`;
  root.prepend(panel);
  const [select] = panel.getElementsByTagName("select");
  const svg = panel.querySelector("svg");
  let at = 0;

  const shapeOf = (symbol, stage) => steps.find((step) => step.symbol === symbol).shapes[stage];

  // Pixels of a row and of a column, one number: as large as the largest array of the stage allows.
  function scaleOf(stage) {
    const shapes = steps.map((step) => step.shapes[stage]).filter(Boolean);
    const largest = (axis) => Math.max(...shapes.map((shape) => shape.at(axis)));
    return Math.min(ROOM.rows / largest(-2), ROOM.columns / largest(-1));
  }

  // An array at (x, 0): a sheet a head, its name and its rows and columns above; returns its width.
  function drawArray(symbol, shape, x, scale, made) {
    const heads = shape.length === 4 ? shape[1] : 1;
    const [rows, columns] = shape.slice(-2);
    const wide = scale * columns, high = scale * rows, full = symbol === "weights" ? scale * rows : 0;
    let drawn = `<text x="${x}" y="10" class="${made ? "made" : ""}">${symbol}</text>
      <text x="${x}" y="22">${rows}×${columns}</text>`;
    for (let h = heads - 1; h >= 0; h--)
      drawn += `<rect x="${x + 3 * h}" y="${ROOM.top + 2 * (heads - 1 - h)}" width="${wide}" height="${high}"
        class="${made ? "part" : "sheet"}"/>`;
    if (full > wide + 1)
      drawn += `<path d="M${x + wide} ${ROOM.top}h${full - wide}v${full}h${wide - full}" class="without"/>
        <text x="${x + wide + 6}" y="${ROOM.top + full / 2}">without reduction</text>`;
    svg.insertAdjacentHTML("beforeend", drawn);
    return Math.max(wide + 3 * heads, full, 58);
  }

  function draw() {
    const stage = Number(select.value);
    const { symbol, formula, letters, words, shapes } = steps[at];
    const shape = shapes[stage];
    panel.querySelector(".place").textContent = `${at + 1} of ${steps.length}`;
    panel.querySelector(".back").disabled = at === 0;
    panel.querySelector(".on").disabled = at === steps.length - 1;
    [...table.tBodies[0].rows].forEach((row, k) => row.classList.toggle("here", k === at));
    const numbers = shape ? shape.reduce((a, b) => a * b, 1).toLocaleString("en") : "";
    panel.querySelector(".words").innerHTML = "";
    panel.querySelector(".words").append(
      `${symbol} = ${formula}: `,
      shape ? `(${letters}) = (${shape.join(", ")}), ${numbers} numbers. ${words}`
            : "with R = 1 nothing is cut and no norm stands here; every token is a key."
    );
    svg.innerHTML = "";
    if (!shape) return;
    const from = steps[at].from.filter((name) => shapeOf(name, stage));
    const scale = scaleOf(stage);
    let x = 2;
    for (const name of from) x += drawArray(name, shapeOf(name, stage), x, scale, false) + 18;
    drawArray(symbol, shape, x, scale, true);
    const told = (name) => {
      const [, ...more] = shapeOf(name, stage);
      return `${name}, ${more.length === 3 ? `${more[0]} heads of ` : ""}${more.at(-2)} rows and ${more.at(-1)} columns`;
    };
    svg.setAttribute("aria-label", [...from, symbol].map(told).join("; beside it "));
  }

  select.addEventListener("change", draw);
  const [back, on] = panel.querySelectorAll("button");
  function go(step, other) {
    at += step;
    draw();
    if (at === 0 || at === steps.length - 1) other.focus(); // a button switched off would lose it
  }
  back.addEventListener("click", () => go(-1, on));
  on.addEventListener("click", () => go(1, back));
  draw();
})();
