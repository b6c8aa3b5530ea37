"""The page as text: one file that asks for nothing, with texts of models that stay text. A browser is in test_browser.py."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.errors import RacError
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.page import MOST_BYTES, check_size, kl_digit, page, problems_shown
from tests.frontier.sample import ABOUT, HOSTILE, ROWS, row, write_sample


class Parsed(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles by their order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw.append((self.cdata_elem, data))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return page([write_sample(tmp_path / "a")], 300)


def data_of(text: str) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', text)[1])


def traces_of(text: str) -> Any:
    return json.loads(
        gzip.decompress(base64.b64decode(re.search(r'id="traces">(.*?)</script>', text)[1]))
    )


def test_the_page_has_its_own_three_scripts_and_no_address(text: str) -> None:
    found = Parsed(text)
    assert [attributes.get("type") for attributes in found.of("script")] == [
        "application/json",
        "text/plain",
        None,
    ]
    assert not found.of("img")
    assert not found.of("link")
    assert not [
        a
        for _, attributes in found.tags
        for a in attributes
        if a.startswith("on") or a in ("src", "href")
    ]
    assert HOSTILE[:20] not in text
    sources = "".join(raw for tag, raw in found.raw if tag == "script")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "fetch(",
        "XMLHttp",
        "import(",
    ):
        assert word not in sources


def test_the_policy_allows_the_script_and_the_style_that_are_there(text: str) -> None:
    found = Parsed(text)
    policy = next(
        a["content"] for a in found.of("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    hashes = []
    for wanted in ("style", "script"):
        raw = [data for tag, data in found.raw if tag == wanted][-1]
        hashes.append(base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode())
    assert (
        policy
        == f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    )


def test_figures_and_answers_are_those_of_the_folder(text: str) -> None:
    (study,) = data_of(text)["studies"]
    assert [row["label"] for row in study["rows"]] == [row[0] for row in ROWS]
    sparse = study["rows"][1]
    assert sparse["accuracy"] == [0.85, pytest.approx(0.8), pytest.approx(0.9)]
    assert sparse["kl"] == [0.01, 0.001]
    assert sparse["speed"] == 500.0
    assert sparse["layers"][0] == ["model.layers.0.self_attn.q_proj", 0.01, 0.5]
    assert "</script><script>" in sparse["recipe"]
    assert study["rows"][0]["kl"] is None
    (traces,) = traces_of(text)
    assert len(traces["dense"]) == 4
    assert HOSTILE in traces["dense"][0]["text"]
    own = traces["rows"]["50 %"][1]
    assert (own["same_tokens"], own["correct"], own["finish"], own["tokens"]) == (
        3,
        False,
        "length",
        4,
    )
    assert own["kl"] == "001qz000"


@pytest.mark.parametrize(
    ("temperature", "said"),
    [(0.0, "(arithmetic), greedy, at most"), (0.6, ", temperature 0.6, at most")],
)
def test_how_answers_were_drawn_is_said(tmp_path: Path, temperature: float, said: str) -> None:
    about = {**ABOUT, "evaluation": {**ABOUT["evaluation"], "temperature": temperature}}
    (study,) = data_of(page([write_sample(tmp_path / "a", about)], 300))["studies"]
    assert said in study["about"]


def test_digits_of_divergence() -> None:
    assert [kl_digit(kl) for kl in (0.0, 0.00099, 0.001, 0.01, 0.1, 1.0, 10.0, 1e9)] == list(
        "0019irzz"
    )


def test_fewer_answers_are_shown_where_asked(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    (traces,) = traces_of(page([folder], 2))
    assert [trace["id"] for trace in traces["dense"]] == ["p1", "p2"]
    assert {len(own) for own in traces["rows"].values()} == {2}
    assert traces_of(page([folder], 0))[0]["dense"] == []


def test_folders_of_one_evaluation_are_shown_together(tmp_path: Path) -> None:
    a = write_sample(tmp_path / "a", rows=ROWS[:3])
    b = write_sample(tmp_path / "b", rows=[ROWS[0], *ROWS[3:]])
    other = write_sample(tmp_path / "c", {**ABOUT, "model": "another"}, ROWS[:2])
    together = data_of(page([a, b, other], 300))["studies"]
    assert [[row["label"] for row in study["rows"]] for study in together] == [
        [row[0] for row in ROWS],
        ["dense", "50 %"],
    ]
    assert traces_of(page([a, b], 300))[0]["rows"].keys() == {row[0] for row in ROWS[1:]}
    with pytest.raises(RacError, match="'50 %' is also a row of another of these folders"):
        page([a, write_sample(tmp_path / "d", rows=ROWS[:2])], 300)


def test_folders_with_other_answers_of_the_dense_model_are_shown_apart(tmp_path: Path) -> None:
    """As another processor writes them: KL along them cannot be compared."""
    a, b = (
        write_sample(tmp_path / name, rows=[ROWS[0], ROWS[place]])
        for place, name in ((1, "a"), (2, "b"))
    )
    together = data_of(page([a, b], 300))["studies"]
    assert [study["name"] for study in together] == ["tiny, arithmetic"]
    path = next((b / "traces").glob("dense*.json"))
    content = json.loads(path.read_text())
    content["traces"][0]["ids"][0] += 1
    path.write_text(json.dumps(content))
    apart = data_of(page([a, b], 300))["studies"]
    assert [study["name"] for study in apart] == ["tiny, arithmetic, a", "tiny, arithmetic, b"]
    assert [[row["label"] for row in study["rows"]] for study in apart] == [
        ["dense", "50 %"],
        ["dense", "2:4"],
    ]


def test_a_folder_without_its_dense_model(tmp_path: Path) -> None:
    with pytest.raises(RacError, match="the dense model was not measured"):
        page([write_sample(tmp_path, rows=ROWS[1:2])], 300)


def test_a_page_of_300_problems_fits(tmp_path: Path) -> None:
    """Words of random letters pack worse than chains of thought; 300 tokens per answer, 2 rows."""
    folder = write_sample(tmp_path, rows=ROWS[:1])
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(2000)]
    text = "".join(rng.choices(words, k=300 * 300))
    path = next((tmp_path / "traces").glob("*.json"))
    content = json.loads(path.read_text())
    answers = [text[i * 1200 : (i + 1) * 1200] for i in range(300)]
    dense = content["traces"][0] | {"ids": [1] * 300, "pieces": [4] * 300}
    content["traces"] = [dense | {"text": answer} for answer in answers]
    path.write_text(json.dumps(content))
    with FrontierFolder(tmp_path) as results:
        for name in "ab":
            own = {**dense, "same_tokens": 1, "same_characters": 4}
            made = [
                own | {"text": answer[::-1], "kl": [rng.lognormvariate(-6, 3) for _ in range(300)]}
                for answer in answers
            ]
            results.add(row(name, "sparse", 1.0, 0.5, 0.1), made)
    made_page = page([folder], 300)
    assert len(made_page.encode()) < MOST_BYTES == 5_000_000
    check_size(made_page, Path("x.html"), 300)


def test_a_page_that_is_too_large_is_refused() -> None:
    with pytest.raises(
        RacError, match=r"would have 10\.0 MB, more than 5 MB; .* than 300 \(--traces 75\)"
    ):
        check_size("x" * 10_000_000, Path("x.html"), 300)


def test_advice_counts_the_problems_that_there_are(tmp_path: Path) -> None:
    folders = [
        write_sample(
            tmp_path / str(count),
            {**ABOUT, "evaluation": {**ABOUT["evaluation"], "problems": count}},
        )
        for count in (2, 5)
    ]
    assert [problems_shown(folders, most) for most in (300, 3)] == [5, 3]
