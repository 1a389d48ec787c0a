"""Questions that come back, in the built site: grades, what is due, and what is remembered.

Run by make check-site, after tests/check_site.py, from which the browser comes.
"""

from datetime import datetime, timedelta

import pytest
from browsing import SITE, violations
from questions import FOLDER, read

KEY = "pvt_ref.recall"
ALL = [question.id for path in FOLDER.iterdir() for question in read(path.stem)]

#: What is kept, as the browser has it.
_KEPT = f"JSON.parse(localStorage.getItem('{KEY}') ?? '{{}}')"


def card(days: float) -> dict:
    """A question that was graded, and is due in so many days."""
    now = datetime.now().astimezone()
    return {
        "due": (now + timedelta(days=days)).isoformat(),
        "last_review": (now - timedelta(days=3)).isoformat(),
        **{"stability": 3.0, "difficulty": 5.0, "scheduled_days": 3, "elapsed_days": 0},
        **{"learning_steps": 0, "reps": 1, "lapses": 0, "state": 2},
    }


def keep(tab, cards) -> None:
    tab.evaluate(f"cards => localStorage.setItem('{KEY}', JSON.stringify(cards))", cards)
    tab.reload()


def test_a_graded_question_is_remembered_and_comes_back(open_page):
    tab = open_page("course/linear.html")
    words = tab.locator(".recall .words")
    asked = read("linear")
    assert words.inner_text() == f"None of {len(asked)} questions has been graded yet."
    first = tab.locator(f'[data-question="{asked[0].id}"]')
    first.locator("summary").focus()
    tab.keyboard.press("Enter")  # opens it
    spans = first.locator(".recall-grades small").all_inner_texts()
    assert spans[0] == "1 minute"
    assert spans[3].endswith("days")
    tab.keyboard.press("4")
    kept = tab.evaluate(_KEPT)
    assert list(kept) == [asked[0].id]
    days = (datetime.fromisoformat(kept[asked[0].id]["due"]) - datetime.now().astimezone()).days
    assert abs(days + 1 - int(spans[3].split()[0])) <= 1
    assert words.inner_text().startswith(f"Easy: comes back in {spans[3]}.")
    assert first.get_attribute("open") is None
    on = "e => document.activeElement === e"
    second = tab.locator(f'[data-question="{asked[1].id}"]')
    assert second.locator("summary").evaluate(on)  # the next question has the focus
    second.locator("summary").click()
    second.get_by_role("button", name="Again").click()
    tab.reload()
    assert set(tab.evaluate(_KEPT)) == {asked[0].id, asked[1].id}
    assert f"0 due, 2 graded, of {len(asked)} questions." in words.inner_text()
    assert "1 minute" in words.inner_text()


def test_the_review_lists_what_is_due_of_all_pages(open_page):
    tab = open_page("review.html")
    assert tab.locator("article > .recall-question").count() == len(ALL)
    cards = {"linear-dx": card(-1), "gelu-derivative": card(-2), "sra-fork": card(5)}
    keep(tab, cards | {"no-such-question": card(-9), "linear-dw": {"due": "broken"}})
    due = tab.locator(".recall .due .recall-question")
    ids = "found => found.map(e => e.dataset.question)"
    assert due.evaluate_all(ids) == ["gelu-derivative", "linear-dx"]  # what waits longest, first
    assert "2 due, 3 graded" in tab.locator(".recall .words").inner_text()
    assert due.first.locator('a[href="course/gelu.html"]').count() == 1
    due.first.locator("summary").click()
    tab.keyboard.press("3")
    assert due.evaluate_all(ids) == ["linear-dx"]
    assert due.first.locator("summary").evaluate("e => document.activeElement === e")
    due.first.locator("summary").click()
    due.first.get_by_role("button", name="Hard").click()
    assert due.count() == 0
    assert tab.locator(".recall .words").evaluate("e => document.activeElement === e")
    assert all(
        datetime.fromisoformat(tab.evaluate(_KEPT)[key]["due"]) > datetime.now().astimezone()
        for key in cards
    )
    tab.once("dialog", lambda dialog: dialog.accept())
    tab.get_by_role("button", name="Forget all grades").click()
    assert tab.evaluate(_KEPT) == {}
    assert "None of" in tab.locator(".recall .words").inner_text()


def test_where_a_browser_keeps_nothing_the_page_says_so(browser):
    context = browser.new_context()
    tab = context.new_page()
    noise = []
    tab.on("pageerror", lambda error: noise.append(str(error)))
    refuse = "throw new DOMException('refused', 'SecurityError')"
    tab.add_init_script(
        f"Object.defineProperty(window, 'localStorage', {{ get() {{ {refuse}; }} }});"
    )
    tab.goto((SITE / "course" / "gelu.html").as_uri())
    question = tab.locator(".recall-question").first
    question.locator("summary").click()
    question.get_by_role("button", name="Good").click()
    words = tab.locator(".recall .words").inner_text()
    assert words.startswith("Good: comes back in 10 minutes.")
    assert "1 graded" in words
    assert "keeps nothing" in words
    assert [line for line in noise if "recall" in line or "FSRS" in line] == []
    context.close()


@pytest.mark.parametrize(("page", "scheme"), [("review", "light"), ("course/linear", "dark")])
def test_due_questions_pass_axe_when_they_are_open(page, scheme, open_page):
    tab = open_page(f"{page}.html", 390, scheme)
    keep(tab, {"linear-dx": card(-1), "linear-dw": card(5)})
    tab.locator(".recall-question:has(.recall-due:not([hidden])) summary").first.click()
    open_now = "['.recall', '[data-question=linear-dx]', '[data-question=linear-dw]']"
    assert violations(tab, open_now, least_serious="minor") == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_forced_colours_show_what_is_due(open_page):
    tab = open_page("course/linear.html", forced_colors="active")
    keep(tab, {"linear-dx": card(-1)})
    shown = tab.locator(".recall-due:visible")
    assert shown.count() == 1
    assert shown.evaluate("e => getComputedStyle(e).borderTopStyle") == "solid"


def test_without_a_script_it_is_a_list_that_opens(open_page):
    tab = open_page("review.html", java_script_enabled=False)
    assert tab.locator(".recall-question").count() == len(ALL)
    assert tab.locator("article button").count() == 0
    question = tab.locator('[data-question="linear-dx"]')
    assert not question.locator("p").first.is_visible()
    question.locator("summary").click()
    assert question.locator("p").first.is_visible()


def test_the_file_for_anki_is_on_the_site():
    lines = (SITE / "review" / "pvt_ref.txt").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("#")] == lines[:5]
    assert sorted(line.partition("\t")[0] for line in lines[5:]) == sorted(
        f"pvt_ref-{key}" for key in ALL
    )
