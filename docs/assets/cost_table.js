// Sliders for the image's side and R; the numbers are count_cost's, the formulas are shown with them.
(function () {
  const root = document.getElementById("cost-table");
  if (!root) return;
  const data = JSON.parse(root.querySelector("script").textContent);
  const { sides, ratios, C, L, reductions, bills, name } = data;
  const say = (x) => x.toLocaleString("en");
  root.querySelector("table").hidden = true;
  const panel = document.createElement("div");
  panel.className = "panel";
  panel.innerHTML = `
    <div class="controls">
      <label>Side of the image <input type="range" autocomplete="off" class="side" min="0" max="${sides.length - 1}"
        value="${Math.max(sides.indexOf(512), 0)}"> <output></output></label>
      <label>R of stage 1 <input type="range" autocomplete="off" class="ratio" min="0" max="${ratios.length - 1}" value="0">
        <output></output></label>
    </div>
    <div class="md-typeset__scrollwrap"><table><thead><tr><th scope="col">stage</th><th scope="col">R</th>
      <th scope="col">tokens n</th><th scope="col">keys m = n / R²</th>
      <th scope="col">attention's MACs, 2 n m C, times the blocks</th><th scope="col">all MACs</th><th scope="col">at most alive</th>
      </tr></thead><tbody></tbody></table></div>
    <svg viewBox="0 0 360 145" role="img"></svg>
    <p class="legend">The bars: all MACs of a stage, and the narrow bars inside, those of attention's two products; on a
      logarithmic scale, which stays the same.</p>
    <p class="words" aria-live="polite"></p>`;
  root.prepend(panel);
  const side = panel.querySelector(".side"), ratio = panel.querySelector(".ratio");

  // One scale for all sides and R, from the least that a bar shows to the most.
  const all = Object.values(bills).flatMap((bill) => [...bill.macs, ...bill.attention]);
  const low = Math.floor(Math.log10(Math.min(...all))), high = Math.ceil(Math.log10(Math.max(...all)));
  const width = (macs) => (290 * (Math.log10(macs) - low)) / (high - low);
  const units = { 6: "1 MMAC", 9: "1 GMAC", 12: "1 TMAC" };
  const ruler = Array.from({ length: high - low + 1 }, (_, k) => low + k).map((power) => `
      <line x1="${55 + width(10 ** power)}" x2="${55 + width(10 ** power)}" y1="4" y2="128" class="decade"/>
      <text x="${55 + width(10 ** power)}" y="140" text-anchor="middle">${units[power] ?? ""}</text>`).join("");

  function draw() {
    const s = sides[side.value], r = ratios[ratio.value];
    const bill = bills[`${s},${r}`], R = reductions[r];
    side.nextElementSibling.value = `${s} pixels`;
    ratio.nextElementSibling.value = R.join(", ");
    side.setAttribute("aria-valuetext", `${s} pixels`);
    ratio.setAttribute("aria-valuetext", `R = ${R.join(", ")}`);
    panel.querySelector("tbody").innerHTML = R.map((R_i, i) => `
      <tr><th scope="row">${i + 1}</th><td>${R_i}</td><td>${say(bill.n[i])}</td><td>${say(bill.m[i])}</td>
      <td>2 · ${say(bill.n[i])} · ${say(bill.m[i])} · ${C[i]} · ${L[i]} = ${say(bill.attention[i])}</td>
      <td>${say(bill.macs[i])}</td><td>${(bill.peak[i] / 1e6).toFixed(1)} MB</td></tr>`).join("");
    const total = bill.macs.reduce((a, b) => a + b, 0);
    panel.querySelector(".words").textContent =
      `${name}, image of ${s}×${s}, R = ${R.join(", ")}: ${(total / 1e9).toFixed(2)} GMACs, ` +
      `${(Math.max(...bill.peak) / 1e6).toFixed(1)} MB at most alive in float32.`;
    const svg = panel.querySelector("svg");
    svg.innerHTML = ruler + R.map((_, i) => `
      <text x="0" y="${22 + 30 * i}">stage ${i + 1}</text>
      <rect x="55" y="${8 + 30 * i}" width="${width(bill.macs[i])}" height="20" class="sheet"/>
      <rect x="55" y="${13 + 30 * i}" width="${width(bill.attention[i])}" height="10" class="part"/>`).join("");
    svg.setAttribute("aria-label", "Multiply-accumulates of each stage, and within, of attention, on a logarithmic scale: the table's numbers");
  }

  side.addEventListener("input", draw);
  ratio.addEventListener("input", draw);
  draw();
})();
