// Questions that come back: grades below each answer, and a list of what is due.
// ts-fsrs computes when; localStorage keeps it, in this browser only. The questions themselves are
// in the page, and open without this script.
(function () {
  const root = document.querySelector(".recall");
  if (!root) return;
  const { fsrs, createEmptyCard, Rating } = window.FSRS;
  const scheduler = fsrs({ enable_fuzz: false });
  const GRADES = ["Again", "Hard", "Good", "Easy"];
  const KEY = "pvt_ref.recall";
  const inReview = root.hasAttribute("data-review");
  const questions = new Map(
    [...document.querySelectorAll(".recall-question")].map((e) => [e.dataset.question, e]));

  // What is remembered: a card for each question that was graded ------------------------------

  let visit = {}; // the cards, where the browser keeps nothing
  let refused = false;

  const NUMBERS = Object.entries(createEmptyCard()).filter(([, x]) => typeof x === "number").map(([key]) => key);
  const isCard = (card) =>
    card && !isNaN(new Date(card.due)) && NUMBERS.every((key) => Number.isFinite(card[key]));

  function load() {
    if (refused) return visit;
    try {
      const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
      return Object.fromEntries(Object.entries(kept ?? {}).filter(([, card]) => isCard(card)));
    } catch (error) {
      if (!(error instanceof SyntaxError)) refused = true;
      return {};
    }
  }

  function save(cards) {
    visit = cards;
    try {
      if (!refused) localStorage.setItem(KEY, JSON.stringify(cards));
    } catch {
      refused = true;
    }
  }

  const due = (card) => new Date(card.due);
  const isDue = (card) => card !== undefined && due(card) <= new Date();

  function span(milliseconds) {
    const minutes = Math.max(Math.round(milliseconds / 60000), 1);
    for (const [unit, length] of [["year", 525600], ["month", 43200], ["day", 1440], ["hour", 60], ["minute", 1]])
      if (minutes >= length) {
        const count = Math.round(minutes / length);
        return `${count} ${unit}${count > 1 ? "s" : ""}`;
      }
  }

  // Grades below an answer ---------------------------------------------------------------------

  function grade(id, name) {
    const cards = load(), now = new Date();
    cards[id] = scheduler.next(cards[id] ?? createEmptyCard(now), now, Rating[name]).card;
    save(cards);
    draw();
    words.textContent = `${name}: comes back in ${span(due(cards[id]) - now)}. ` + words.textContent;
  }

  function addGrades(question) {
    const id = question.dataset.question;
    const panel = document.createElement("div");
    panel.className = "panel controls recall-grades";
    panel.setAttribute("role", "group");
    panel.setAttribute("aria-label", "How did it go?");
    panel.innerHTML = GRADES.map((name, k) =>
      `<button type="button" aria-keyshortcuts="${k + 1}">${name} <small></small></button>`).join("");
    question.append(panel);
    if (!question.querySelector(".recall-due"))
      question.querySelector("summary").insertAdjacentHTML("beforeend", ' <b class="recall-due" hidden>due</b>');
    const buttons = [...panel.querySelectorAll("button")];

    function given(name) {
      const next = followers(question);
      question.open = false;
      grade(id, name);
      (next.find((e) => e.isConnected) ?? question.querySelector("summary")).focus();
    }

    buttons.forEach((button, k) => button.addEventListener("click", () => given(GRADES[k])));
    question.addEventListener("keydown", (event) => {
      const k = Number(event.key) - 1;
      if (!question.open || !(k in GRADES) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      given(GRADES[k]);
    });
    question.addEventListener("toggle", () => {
      if (!question.open) return;
      const now = new Date();
      const ends = scheduler.repeat(load()[id] ?? createEmptyCard(now), now);
      buttons.forEach((button, k) =>
        (button.lastElementChild.textContent = span(due(ends[Rating[GRADES[k]]].card) - now)));
    });
  }

  // Where the focus goes after a grade: to the next question, or to the words if it was the last.
  function followers(question) {
    const all = [...question.parentElement.querySelectorAll(":scope > .recall-question > summary")];
    const at = all.indexOf(question.querySelector("summary"));
    return [...all.slice(at + 1), ...(question.closest(".panel") ? [words] : [])];
  }

  // What is due --------------------------------------------------------------------------------

  const panel = document.createElement("div");
  panel.className = "panel";
  panel.innerHTML = `<div class="words" role="status" tabindex="-1"></div>
    <div class="due"></div><div class="controls"><button type="button" class="forget">Forget all grades</button></div>`;
  root.append(panel);
  const [words, list, forget] = ["words", "due", "forget"].map((c) => panel.querySelector("." + c));
  forget.hidden = !inReview;
  let timer = 0;

  function tell(cards, waiting) {
    const known = [...questions.keys()].filter((id) => cards[id]);
    const later = known.filter((id) => !isDue(cards[id])).map((id) => due(cards[id])).sort((a, b) => a - b);
    const told = [known.length === 0
      ? `None of ${questions.size} questions has been graded yet.`
      : `${waiting.length} due, ${known.length} graded, of ${questions.size} questions.`];
    if (later.length) told.push(`The next one is due in ${span(later[0] - new Date())}.`);
    if (refused) told.push("This browser keeps nothing for these pages: grades are forgotten when you leave this one.");
    words.textContent = told.join(" ");
    clearTimeout(timer);
    if (later.length) timer = setTimeout(draw, Math.min(Math.max(later[0] - new Date(), 1000), 3600000));
  }

  function draw() {
    const cards = load();
    const waiting = [...questions.keys()].filter((id) => isDue(cards[id]));
    waiting.sort((a, b) => due(cards[a]) - due(cards[b]));
    for (const [id, question] of questions)
      question.querySelector(".recall-due").hidden = !isDue(cards[id]);
    forget.disabled = Object.keys(cards).length === 0;
    if (inReview) {
      const shown = new Map([...list.children].map((e) => [e.dataset.question, e]));
      for (const [id, element] of shown) if (!waiting.includes(id)) element.remove();
      for (const id of waiting) {
        if (shown.has(id)) continue;
        const copy = questions.get(id).cloneNode(true);
        copy.open = false;
        copy.querySelector(".recall-grades").remove();
        addGrades(copy);
        list.append(copy);
      }
    }
    tell(cards, waiting);
  }

  forget.addEventListener("click", () => {
    if (!confirm("Forget all grades, of all pages?")) return;
    save({});
    draw();
  });
  for (const question of questions.values()) addGrades(question);
  window.addEventListener("storage", (event) => event.key === KEY && draw()); // another tab
  document.addEventListener("visibilitychange", () => !document.hidden && draw());
  draw();
})();
