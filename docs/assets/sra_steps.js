// Steps through the shapes of SRA, stage by stage. The table below stays and shows where one is.
(function () {
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
    <svg viewBox="0 0 320 190" role="img"></svg>`;
  root.prepend(panel);
  const [select] = panel.getElementsByTagName("select");
  const svg = panel.querySelector("svg");
  let at = 0;

  // sides grow with the logarithm, so that 49 and 3136 fit on one screen
  const length = (count, most) => 12 + (most * Math.log2(1 + count)) / 13;

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
    const heads = shape.length === 4 ? shape[1] : 1;
    const [rows, columns] = shape.slice(-2);
    const high = length(rows, 115), wide = length(columns, 230);
    for (let h = heads - 1; h >= 0; h--)
      svg.insertAdjacentHTML("beforeend",
        `<rect x="${40 + 4 * h}" y="${30 + 3 * (heads - 1 - h)}" width="${wide}" height="${high}" class="sheet"/>`);
    svg.insertAdjacentHTML("beforeend",
      `<text x="${40 + wide / 2}" y="20" text-anchor="middle">${columns} columns</text>
       <text x="30" y="${30 + high / 2}" text-anchor="middle" transform="rotate(-90 30 ${30 + high / 2})">${rows} rows</text>
       <text x="40" y="${30 + high + 3 * heads + 18}">${heads > 1 ? `${heads} heads, ` : ""}${numbers} numbers</text>`);
    svg.setAttribute("aria-label", `${symbol}: ${heads > 1 ? heads + " sheets of " : ""}${rows} rows and ${columns} columns`);
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
