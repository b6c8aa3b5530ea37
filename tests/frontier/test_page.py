"""The page as text: it asks for nothing, and texts of models stay text. See test_browser.py."""

import base64
import gzip
import hashlib
import json
import random
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rac_modifier.errors import RacError
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.page import MOST_BYTES, _kl_digit, page
from tests.frontier.sample import ABOUT, HOSTILE, ROWS, own_trace, row, write_sample


class Parsed(HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw[self.cdata_elem].append(data)


def studies_of(text: str) -> Any:
    packed = re.search(r'id="data">(.*?)</script>', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_the_page_has_its_scripts_no_address_and_a_policy_that_allows_no_more(tmp_path):
    text = page([write_sample(tmp_path / "a")], 300)
    parsed = Parsed(text)
    tags = [name for name, _ in parsed.tags]
    assert tags.count("script") == 3
    assert not {"img", "link", "iframe", "a"} & set(tags)
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href", "style")]
    assert HOSTILE[:20] not in text
    for word in ("innerHTML", "insertAdjacent", "document.write", "eval(", "fetch(", "import("):
        assert word not in parsed.raw["script"][-1]
    hashes = [
        base64.b64encode(hashlib.sha256(raw.encode()).digest()).decode()
        for raw in (*parsed.raw["style"], *parsed.raw["script"][1:])
    ]
    (policy,) = [a["content"] for _, a in parsed.tags if "Policy" in (a.get("http-equiv") or "")]
    style, library, script = (f"'sha256-{value}'" for value in hashes)
    assert policy == f"default-src 'none'; style-src {style}; script-src {library} {script}"
    assert len(text.encode()) < 1_000_000


def test_figures_and_answers_are_those_of_the_folder(tmp_path):
    about = {**ABOUT, "evaluation": {**ABOUT["evaluation"], "temperature": 0.6}}
    text = page([write_sample(tmp_path / "a", about)], 300)
    assert "same 4 held-out problems, temperature 0.6, at most 50 new tokens" in text
    (table,) = re.findall(r"<table>(.*?)</table>", text.partition('id="data"')[0])
    head, *lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in table.split("<tr")[1:]]
    sparse = dict(zip(head, lines[1], strict=True))
    assert sparse["row"] == "50 %"
    assert sparse["KL"] == "0.010 ± 0.001"
    assert sparse["right"] == "85.0% (80.0 to 90.0)"
    assert (sparse["tokens/s"], sparse["truncated"]) == ("500", "25.0%")
    assert dict(zip(head, lines[0], strict=True))["KL"] == "-"
    (study,) = studies_of(text)
    assert study["row"] == "50 %"
    assert HOSTILE in study["traces"]["dense"][0]["text"]
    own = study["traces"]["rows"]["50 %"][1]
    assert own["kl"] == "001qz000"
    assert (own["same_tokens"], own["kind"], own["loop"], own["tokens"]) == (3, "looping", 12, 4)


def test_a_recipe_that_is_shown_with_a_note_of_several_lines_stays_yaml(tmp_path):
    served = row(*ROWS[1]) | {"served": {"not_measured": "vllm stopped. Its last lines:\na: [\n}"}}
    folder = write_sample(tmp_path, rows=ROWS[:1])
    with FrontierFolder(folder) as results:
        results.add(served, [own_trace(i, equal=True) for i in range(1, 5)])
    (text,) = re.findall(r'<pre data-label="50 %" hidden>(.*?)</pre>', page([folder], 1), re.DOTALL)
    assert text.endswith("# not served: vllm stopped. Its last lines:\n# a: [\n# }")
    assert yaml.safe_load(unescape(text)) == served["recipe"]


def test_a_label_with_two_spaces_can_be_chosen(tmp_path):
    """A browser joins the spaces of an option's text, and takes its value as it is."""
    folder = write_sample(tmp_path, rows=[ROWS[0], ("2:4  <a>", *ROWS[1][1:])])
    assert '<option value="2:4  &lt;a&gt;">2:4  &lt;a&gt;</option>' in page([folder], 1)


def test_digits_of_divergence():
    digits = [_kl_digit(kl) for kl in (0.0, 0.00099, 0.001, 0.01, 0.1, 1.0, 10.0, 1e9)]
    assert digits == list("0019irzz")


def test_a_page_of_many_answers_fits_or_is_refused(tmp_path):
    """Words of random letters pack worse than chains of thought; 300 tokens per answer, 2 rows."""
    folder = write_sample(tmp_path, rows=ROWS[:1], problems=1)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(2000)]
    answers = ["".join(rng.choices(words, k=300)) for _ in range(300)]
    path = next((tmp_path / "traces").glob("*.json"))
    content = json.loads(path.read_text())
    dense = content["traces"][0] | {"ids": [1] * 300, "pieces": [4] * 300}
    content["traces"] = [dense | {"text": answer} for answer in answers]
    path.write_text(json.dumps(content))
    own = {**dense, "same_tokens": 1, "same_characters": 4}
    kl = [rng.lognormvariate(-6, 3) for _ in range(300)]
    with FrontierFolder(tmp_path) as results:
        for name in "ab":
            made = [own | {"text": answer[::-1], "kl": kl} for answer in answers]
            results.add(row(name, "sparse", 1.0, 0.5, 0.1), made)
    with pytest.raises(RacError, match=r"more than 1\.5 MB; show .* than 300 \(--traces"):
        page([folder], 300)
    assert len(studies_of(page([folder], 2))[0]["traces"]["dense"]) == 2
    assert len(page([folder], 50).encode()) < MOST_BYTES == 1_500_000


def test_without_altair_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"pip install 'rac-modifier\[eval\]'"):
        page([Path("x")], 1)
