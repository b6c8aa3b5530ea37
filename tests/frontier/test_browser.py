"""The page in a real browser: drawn, quiet, without a request, and with every text as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.page import page
from tests.frontier.sample import ABOUT, HOSTILE, ROWS, dense_trace, own_trace, row, write_sample
from tests.frontier.test_benchmarks import result

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
if CHROMIUM is None:
    pytest.skip("needs a chromium on the PATH (apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright (pip install playwright)"
)

POINTS = "#charts figure:first-child .point"
OF_KL = "#charts figure:nth-child(2) .point"


class Opened:
    """A page that is open, with what it said and what it asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any):
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]")
        self.address = path.as_uri()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.text_content()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # without its sandbox, which a container's root has no rights for; the page is our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies: all rows, and two of another model."""
    folder = tmp_path_factory.mktemp("report")
    first = write_sample(folder / "a")
    second = write_sample(folder / "b", {**ABOUT, "model": "another"}, ROWS[:2], problems=1)
    with FrontierFolder(second) as results:
        for label, right in (("dense", 4), ("50 %", 1)):
            results.add_benchmark(
                label, "math-500", {"asked": {}, "result": result(label, right).as_dict()}
            )
        results.add_benchmark(
            "dense", HOSTILE, {"asked": {}, "result": result("dense", 2).as_dict()}
        )
    (folder / "report.html").write_text(page([first, second], 300))
    return folder / "report.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    """After each test: nothing was logged, nothing was requested, and no text became markup."""
    found = Opened(browser, report)
    yield found
    assert found.said == []
    assert found.asked == [found.address]
    assert found.page.title() == "Frontier: accuracy and divergence against bytes"
    assert found.count("img") == 0
    assert found.count("script") == 3
    found.page.close()


def test_everything_is_drawn(opened: Opened) -> None:
    titles = opened.texts("#charts figcaption")
    assert titles == [
        "Accuracy against bytes",
        "KL from the dense model against bytes",
        "Accuracy against speed",
        "KL from the dense model against speed",
    ]
    assert opened.count(POINTS) == len(ROWS)
    assert opened.count(OF_KL) == len(ROWS) - 1
    assert opened.count("#rows tbody tr") == len(ROWS)
    assert opened.text("#chosen") == "50 %"
    assert opened.texts("#layers figcaption") == ["Relative error of the output", "Sparsity"]
    assert opened.texts("#layers figure:first-child tbody tr:last-child td") == ["0.020", "0.020"]
    assert "25.0 %" in opened.text("#lengths")
    assert opened.texts("#lengths tbody tr:last-child td") == ["not counted", "12.5 %"]
    assert opened.count("#lengths svg rect") == 20


def test_kl_outside_of_repetitions_has_a_column_where_a_row_has_it(opened: Opened) -> None:
    assert opened.texts("#rows thead th")[3:6] == ["KL", "KL outside of repetitions", "top-1"]
    assert opened.texts("#rows tbody td:nth-child(5)") == ["-", "0.0200", "0.1000", "-", "-", "-"]


def test_the_frontier_joins_what_nothing_beats(opened: Opened) -> None:
    """Fewer bytes and more accuracy: int2, 50 % + int4, GPTQ int4 and dense; 50 % and 2:4 are beaten."""
    path = opened.page.locator("#charts figure:first-child .front").get_attribute("d")
    assert path.count("L") + 1 == 4


def test_a_row_that_is_equal_in_one_direction_and_better_in_the_other_beats(opened: Opened) -> None:
    points = "[[1, 1], [2, 1], [1, 2], [3, 3], [3, 3], [4, 3]].map(([x, y]) => ({ x, y }))"
    left = opened.page.evaluate(f"frontier({points}, -1, 1).map((point) => [point.x, point.y])")
    assert left == [[1, 2], [3, 3], [3, 3]]
    assert opened.page.evaluate(
        f"frontier({points}, 1, -1).map((point) => [point.x, point.y])"
    ) == [[2, 1], [4, 3]]


def test_hostile_text_stays_text(opened: Opened) -> None:
    hostile = next(label for label, *_ in ROWS if HOSTILE in label)
    opened.page.locator("#rows tbody tr").last.click()
    assert opened.text("#chosen") == hostile
    assert "</script><script>" in opened.text("#recipe")
    assert opened.text("#question").startswith(f"question 1 {HOSTILE}")
    assert HOSTILE in opened.text("#answers .answer")
    opened.page.locator("#next").click()
    assert opened.texts("#answers .answer")[1].endswith(HOSTILE)


def test_a_group_is_filtered_by_a_click_and_by_the_keyboard(opened: Opened) -> None:
    button = opened.page.locator("#groups button[data-group='dense quantized']")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert opened.count(POINTS) == opened.count("#rows tbody tr") == len(ROWS) - 2
    button.press("Enter")
    assert opened.count(POINTS) == len(ROWS)
    opened.page.locator("#find").fill("INT4")
    assert opened.texts("#rows tbody th") == ["50 % + int4", "GPTQ int4"]
    opened.page.locator("#find").fill("no such row")
    assert "No row is shown." in opened.text("#charts")


def test_a_mark_is_chosen_by_a_click_and_by_the_keyboard(opened: Opened) -> None:
    opened.page.locator(f"{POINTS}[data-label='GPTQ int4'] .mark").click()
    assert opened.text("#chosen") == "GPTQ int4"
    assert "upstream's modifiers record no error" in opened.text("#layers")
    opened.page.locator(f"{POINTS}[data-label='2:4']").press("Enter")
    assert opened.text("#chosen") == "2:4"
    focused = "document.activeElement.getAttribute('data-label')"
    assert opened.page.evaluate(focused) == "2:4", (
        "the focus is not lost when the charts are drawn again"
    )
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate(focused) == "50 % + int4"
    assert opened.text("#tip").startswith("50 % + int4\n2.000 MB in all")


def test_a_row_of_the_table_keeps_the_focus_when_it_is_chosen(opened: Opened) -> None:
    opened.page.locator("#rows tr[data-label='2:4'] button").press("Enter")
    assert opened.page.locator("#chosen").text_content() == "2:4"
    assert opened.page.evaluate("document.activeElement.textContent") == "2:4"
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "50 % + int4"


def test_the_recipe_is_shown_at_the_mark(opened: Opened) -> None:
    opened.page.locator(f"{POINTS}[data-label='50 %'] .mark").hover()
    tip = opened.page.locator("#tip")
    assert tip.is_visible()
    assert "accuracy 85.0 % (80.0 % to 90.0 %)" in tip.text_content()
    assert "label: 50 %" in tip.text_content()
    opened.page.mouse.move(2, 2)
    assert not tip.is_visible()


def test_bytes_without_head_and_embeddings(opened: Opened) -> None:
    name = opened.page.locator(f"{POINTS}[data-label='50 %']").get_attribute("aria-label")
    opened.page.locator("input[value=matrices]").check()
    other = opened.page.locator(f"{POINTS}[data-label='50 %']").get_attribute("aria-label")
    assert (name, other) == ("50 %: MB 5, accuracy 85 %", "50 %: MB 4.5, accuracy 85 %")


def test_the_answers_side_by_side(opened: Opened) -> None:
    assert opened.text("#place") == "1 of 4"
    assert opened.count("#answers mark") == 0, "problem 1 is answered alike"
    opened.page.keyboard.press("n")
    assert opened.text("#place") == "2 of 4"
    assert opened.texts("#answers figcaption") == [
        "dense: right, finished, 8 tokens",
        "50 %: wrong, cut, 4 tokens",
    ]
    # the fourth token is the first that differs; the token after it has the largest KL
    assert opened.texts("#answers .answer mark") == ["one ", "<"]
    shades = opened.page.locator("#answers figure:first-child span")
    assert shades.all_text_contents() == ["🙂", "two"]
    assert "0.85" in shades.last.evaluate("(element) => element.style.background")
    opened.page.keyboard.press("p")
    assert opened.text("#place") == "1 of 4"
    opened.page.locator("#which").select_option("gained")
    assert opened.text("#place") == "1 of 1"
    assert opened.text("#question").startswith("question 3")
    opened.page.locator("#which").select_option("cut")
    assert opened.text("#place") == "2 of 3", "the problem stays where it is still shown"
    opened.page.locator("#which").select_option("lost")
    assert opened.text("#place") == "1 of 2"


def test_another_study(opened: Opened) -> None:
    opened.page.locator("#study").select_option(index=1)
    assert opened.text("#about").startswith("another; every row answers")
    assert opened.count(POINTS) == 2
    assert opened.text("#place") == "1 of 1"
    assert opened.page.locator("#next").is_disabled()


@pytest.mark.parametrize(
    ("scheme", "paper"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(23, 23, 23)")]
)
def test_light_and_dark(browser: Any, report: Path, scheme: str, paper: str) -> None:
    found = Opened(browser, report, color_scheme=scheme)
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    found.page.close()


def test_in_print_the_answers_are_whole_and_the_controls_are_gone(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("#find").is_visible()
    assert opened.page.locator("#charts").is_visible()
    assert (
        opened.page.evaluate("getComputedStyle(document.querySelector('.answer')).maxHeight")
        == "none"
    )


def test_the_accuracy_on_a_benchmark(opened: Opened) -> None:
    assert not opened.page.locator("#asked-choice").is_visible(), "this study has none"
    opened.page.select_option("#study", "1")
    assert opened.page.locator("#asked-choice").is_visible()
    assert opened.texts("#asked option") == ["the held-out problems", "math-500", HOSTILE]
    heads = opened.texts("#rows thead th")
    column = heads.index("math-500")
    assert opened.texts(f"#rows tbody tr > :nth-child({column + 1})") == ["100.0 %", "25.0 %"]
    assert opened.texts(f"#rows tbody tr > :nth-child({heads.index(HOSTILE) + 1})") == [
        "50.0 %",
        "-",
    ]
    opened.page.select_option("#asked", "math-500")
    assert opened.texts("#charts figcaption")[0] == "Accuracy on math-500 against bytes"
    assert opened.count(POINTS) == 2
    opened.page.select_option("#asked", HOSTILE)
    assert opened.count(POINTS) == 1
    assert "# math-500 (4 problems, 1 answer each, at most 9 new tokens): 25.0 %" in opened.text(
        "#recipe"
    )
    assert "50 % against dense: -75.0 points" in opened.text("#recipe")
    opened.page.select_option("#study", "0")
    assert opened.texts("#charts figcaption")[0] == "Accuracy against bytes"


def test_a_column_that_no_row_has_is_left_out_and_one_chart_does_not_fill_the_page(
    browser: Any, opened: Opened, tmp_path: Path
) -> None:
    """Problems without answers, not served: no accuracy, no speed."""
    with FrontierFolder(tmp_path / "bare") as folder:
        folder.begin(ABOUT)
        for values, traces in zip(
            ROWS[:2], ([dense_trace(1)], [own_trace(1, equal=True)]), strict=True
        ):
            folder.add(row(*values) | {"accuracy": None, "served": None}, traces)
    (tmp_path / "bare.html").write_text(page([tmp_path / "bare"], 300))
    bare = Opened(browser, tmp_path / "bare.html")
    heads, fewer = (each.texts("#rows thead th") for each in (opened, bare))
    lacking = {"accuracy", "95 %", "tokens/s"}
    assert lacking <= set(heads)
    assert not lacking & set(fewer)
    assert {"row", "MB", "KL", "cut", "values"} <= set(fewer)
    assert bare.count("#charts figure") == 1
    assert (
        bare.page.evaluate(
            "document.querySelector('#charts figure').offsetWidth / document.body.offsetWidth"
        )
        < 0.6
    )
    bare.page.close()
