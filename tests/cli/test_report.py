"""`rac report`: the page is written whole, or a message says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from rac_modifier.frontier.page import page
from tests.cli.conftest import Rac
from tests.frontier.sample import write_sample


def test_a_page_of_several_folders(rac: Rac, tmp_path: Path) -> None:
    folders = [write_sample(tmp_path / name, {"evaluation": ABOUT, "model": name}) for name in "ab"]
    code, out, _ = rac("report", *folders, "-o", tmp_path / "report.html", "--traces", "2")
    assert code == 0
    assert out == f"{tmp_path / 'report.html'}: 0.04 MB; open it in a browser\n"
    assert (tmp_path / "report.html").read_text() == page(folders, 2)


ABOUT = {"source": "arithmetic", "problems": 4, "cap": 50, "temperature": 0.6}


@pytest.mark.parametrize(
    ("folder", "output", "says"),
    [
        ("a", "report.txt", "use a name that ends in .html"),
        ("a", "no/report.html", "its folder does not exist; create it first"),
        (
            "b",
            "report.html",
            "b holds no results of rac frontier; make them with: rac frontier MODEL --out",
        ),
    ],
)
def test_what_cannot_be_written(
    rac: Rac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, output: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample(tmp_path / "a")
    code, _, error = rac("report", folder, "-o", output)
    assert code == 1
    assert says in error
    assert not list(tmp_path.glob("report*"))
