"""The page in a real browser: drawn, quiet, without a request, and with every text as text."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.frontier.page import page
from tests.frontier.sample import HOSTILE, ROWS, write_sample

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROMIUM is None:
    pytest.skip("needs a chromium on the PATH (apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
MARKS = "figure:nth-child({}) .mark-symbol.role-mark path"


class Opened:
    """A page that is open, with what it logged and requested."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any):
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]")
        self.address = path.as_uri()
        self.study = self.page.locator(".study").first

    def marks(self, chart: int) -> int:
        """Count the points of a chart."""
        self.page.wait_for_function("() => new Promise((done) => requestAnimationFrame(done), 1)")
        return self.study.locator(MARKS.format(chart)).count()

    def texts(self, selector: str) -> list[str]:
        return self.study.locator(selector).all_text_contents()

    def set(self, signal: str, value: str) -> None:
        control = self.study.locator(f"[data-signal={signal}]")
        control.fill(value) if signal == "find" else control.select_option(value)

    @property
    def row(self) -> str:
        return self.study.locator("[data-signal=row]").input_value()

    def check(self) -> None:
        """Nothing was logged or requested, and no text became markup."""
        assert self.said == []
        assert self.asked == [self.address]
        assert self.page.title() == "Frontier: accuracy and divergence against bytes"
        assert self.page.locator("img").count() == 0
        assert self.page.locator("script").count() == 3


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # without its sandbox, which a container's root has no rights for; the page is ours
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    text = page([write_sample(folder / "a"), write_sample(folder / "b", rows=ROWS[:2])], 300)
    (folder / "report.html").write_text(text)
    return folder / "report.html"


@pytest.fixture(scope="module")
def shared(browser, report) -> Iterator[Opened]:
    opened = Opened(browser, report)
    yield opened
    opened.page.close()


@pytest.fixture
def opened(shared) -> Iterator[Opened]:
    shared.set("row", "50 %")
    yield shared
    shared.check()


def test_everything_is_drawn(opened):
    assert [text.partition(",")[0] for text in opened.texts(".charts figcaption")] == [
        "Accuracy",
        "KL from the dense model",
        "How answers end",
        "Tokens per answer: the chosen row against the dense model",
    ]
    assert (opened.marks(1), opened.marks(2), opened.marks(4)) == (len(ROWS), len(ROWS) - 1, 4)
    assert opened.study.locator("figure:nth-child(3) .mark-rect.role-mark path").count() == 30
    assert opened.texts("tr.chosen td:first-child") == ["50 %"]
    assert opened.page.locator(".vega-actions a").count() == 2 * 8  # SVG and PNG of each chart


def test_controls_are_set_in_all_charts(opened):
    opened.set("find", "INT4")
    assert (opened.marks(1), opened.marks(2)) == (2, 2)
    opened.set("find", "")
    opened.set("axis", "tokens per second")
    assert (opened.marks(1), opened.marks(2)) == (2, 2)
    opened.set("axis", "MB of the checkpoint")
    assert opened.marks(1) == len(ROWS)


def test_a_mark_and_a_row_of_the_table_choose_a_row_and_a_point_a_problem(opened):
    opened.study.locator(MARKS.format(1)).nth(2).click(force=True)
    assert opened.row == "2:4"
    opened.study.locator("tr[data-label='GPTQ int4']").click()
    assert opened.row == "GPTQ int4"
    opened.set("row", "50 %")
    assert opened.texts("pre:not([hidden])")[0].startswith("stage:")
    opened.study.locator(MARKS.format(4)).last.click(force=True)
    assert opened.study.locator(".problem").input_value() == "3"


def test_the_tooltip_and_hostile_texts_stay_text(opened):
    hostile = next(label for label, *_ in ROWS if HOSTILE in label)
    opened.study.locator(MARKS.format(2)).last.hover(force=True)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "onerror" in tip.text_content()
    opened.page.mouse.move(2, 2)
    opened.set("row", hostile)
    assert "</script><script>" in opened.texts("pre:not([hidden])")[0]
    opened.study.locator(".problem").select_option("1")
    assert opened.texts(".question")[0].startswith(f"question 2 {HOSTILE}")
    assert opened.texts(".answer")[1].endswith(HOSTILE[1:])


def test_the_answers_next_to_each_other(opened):
    opened.study.locator(".which").select_option("all")
    opened.study.locator(".problem").select_option("0")
    assert opened.study.locator(".answers mark").count() == 0, "problem 1 is answered alike"
    assert opened.study.locator(".previous").is_disabled()
    opened.study.locator(".next").click()
    captions = ["dense: right, 8 tokens", "50 %: truncated, looping, 4 tokens"]
    assert opened.texts(".answers figcaption") == captions
    # the fourth token is the first that differs; the token after it has the largest KL
    assert opened.texts(".answers mark") == ["one ", "loop", "<"]
    own = "".join(opened.texts(".answer")[1])
    assert own.index("loop") == 12, "the loop begins where the answers part"
    shades = opened.study.locator(".answers figure:first-child span")
    assert shades.all_text_contents() == ["🙂", "two"]
    assert "0.85" in shades.last.evaluate("(element) => element.style.background")
    for which, problems in (("gained", ["2"]), ("lost", ["1", "3"]), ("looping", ["1", "2", "3"])):
        opened.study.locator(".which").select_option(which)
        options = opened.study.locator(".problem option")
        assert [option.get_attribute("value") for option in options.all()] == problems
    opened.study.locator(".which").select_option("all")


PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(23, 23, 23)"}


@pytest.mark.parametrize("scheme", PAPER)
def test_a_narrow_page_in_light_and_dark_does_not_scroll_sideways(browser, report, scheme):
    narrow = Opened(browser, report, width=400, color_scheme=scheme)
    assert narrow.page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
    assert narrow.page.evaluate("document.documentElement.scrollWidth") == 400
    narrow.check()
    narrow.page.emulate_media(media="print")
    assert not narrow.study.locator(".controls").first.is_visible()
    height = "getComputedStyle(document.querySelector('.answer')).maxHeight"
    assert narrow.page.evaluate(height) == "none"
    narrow.page.close()
