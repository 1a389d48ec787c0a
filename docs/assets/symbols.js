// A symbol pointed at, in an equation, the source or a table of shapes, lights up in all three.
// equations.py marks equations with data-symbol, a number in the page's list of names.
// By keyboard: the symbols of the tables take the focus; Enter or space keeps them lit.

(function () {
  const list = document.getElementById("symbols");
  if (!list) return;
  const groups = JSON.parse(list.textContent).map((names) => ({ names, members: [] }));
  let kept = null;

  const byName = new Map();
  for (const group of groups) for (const name of group.names) byName.set(name, group);

  function light(group, on) {
    for (const element of group.members) element.classList.toggle("lit", on);
  }

  function join(element, group) {
    if (!group) return;
    group.members.push(element);
    element.classList.add("symbol");
    element.addEventListener("pointerenter", () => light(group, true));
    element.addEventListener("pointerleave", () => kept !== group && light(group, false));
    element.addEventListener("click", () => keep(group));
  }

  function keep(group) {
    if (kept) light(kept, false);
    kept = kept === group ? null : group;
    if (kept) light(kept, true);
    for (const each of groups)
      for (const element of each.members)
        if (element.hasAttribute("aria-pressed"))
          element.setAttribute("aria-pressed", String(each === kept));
  }

  for (const element of document.querySelectorAll("[data-symbol]"))
    join(element, groups[Number(element.dataset.symbol)]);
  for (const element of document.querySelectorAll(".highlight code span"))
    if (element.childElementCount === 0) join(element, byName.get(element.textContent));
  for (const element of document.querySelectorAll(".shapes code, .shapes .axis")) {
    const group = byName.get(element.textContent);
    if (!group) continue;
    join(element, group);
    element.tabIndex = 0;
    element.setAttribute("role", "button");
    element.setAttribute("aria-pressed", "false");
    element.addEventListener("focus", () => light(group, true));
    element.addEventListener("blur", () => kept !== group && light(group, false));
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      keep(group);
    });
  }
})();

// What scrolls sideways can be scrolled by keyboard too.
(function () {
  const wide = ".equation, .drawn, .md-typeset__scrollwrap, .highlight pre, .highlight code, p:has(> img)";
  function reach() {
    for (const element of document.querySelectorAll(wide))
      if (element.scrollWidth > element.clientWidth + 1) element.tabIndex = 0;
      else if (element.matches("div, p")) element.removeAttribute("tabindex");
  }
  window.addEventListener("load", reach);
  window.addEventListener("resize", reach);
})();
