"""The folder of a frontier survives kills, and refuses what cannot be compared."""

import json
import resource
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.frontier.folder import FrontierFolder, slug
from tests.frontier import sample

ABOUT = {
    "model": "m",
    "evaluation": {"problems": 3, "source": "arithmetic", "cap": 50, "temperature": 0.0},
}


def row(label: str) -> dict:
    return sample.row(label, "sparse", 1.0, 0.5, 0.1)


def filled(path: Path) -> FrontierFolder:
    with FrontierFolder(path) as folder:
        folder.begin(ABOUT)
        folder.add(row("a"), [{"id": "1", "text": "ä"}])
        folder.add(row("b/ü"), [])
    return folder


def test_rows_and_traces_come_back(tmp_path):
    filled(tmp_path / "new" / "out")
    actual = FrontierFolder.read(tmp_path / "new" / "out")
    assert actual.about == {"version": 2, **ABOUT}
    assert [row["label"] for row in actual.rows] == ["a", "b/ü"]
    assert actual.row("b/ü") == {"version": 2, **row("b/ü")}
    assert actual.row("c") is None
    assert actual.traces("a") == [{"id": "1", "text": "ä"}]


def test_results_of_another_version_are_refused(tmp_path):
    filled(tmp_path)
    path = tmp_path / "frontier.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(RacError, match="is of version 1, and this package reads and writes ver"):
        FrontierFolder(tmp_path)


DAMAGED = {
    "bytes": {"total": "x", "matrices": 1, "bits_per_weight": 1.0},
    "paired": {"x": 1},
    "label": 5,
    "accuracy": {"accuracy": 1.0},
    "served": [],
    "thinking": None,
}


@pytest.mark.parametrize("name", [*DAMAGED, None])
def test_a_damaged_line_is_named(tmp_path, name):
    filled(tmp_path)
    path = tmp_path / "rows.jsonl"
    line = "{" if name is None else json.dumps({"version": 2, **row("c"), name: DAMAGED[name]})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RacError, match=r"(?s)line 3: .* remove this line"):
        FrontierFolder(tmp_path)


def test_what_all_rows_share_is_checked(tmp_path):
    filled(tmp_path)
    (tmp_path / "frontier.json").write_text('{"version": 2, "model": "m"}')
    with pytest.raises(RacError, match=r"(?s)frontier\.json: damaged .*evaluation"):
        FrontierFolder.read(tmp_path)


def test_a_full_disk_is_no_raw_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # no file may grow
    try:
        with pytest.raises(RacError, match=r"cannot be written to .*File too large"):
            FrontierFolder(tmp_path).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_damaged_traces_are_named(tmp_path):
    folder = filled(tmp_path)
    next((tmp_path / "traces").glob("a-*")).write_text('{"version": 2, "traces": 3}')
    with pytest.raises(RacError, match="remove the line of 'a' in rows"):
        folder.traces("a")


def test_a_folder_of_another_evaluation_is_refused(tmp_path):
    filled(tmp_path)
    words = r'another evaluation \(\{"problems": 3, .* there, \{"problems": 4\} now\)'
    with FrontierFolder(tmp_path) as folder, pytest.raises(RacError, match=words):
        folder.begin({**ABOUT, "evaluation": {"problems": 4}})
    (tmp_path / "frontier.json").unlink()
    with pytest.raises(RacError, match=r"frontier\.json: cannot be read .* put it back"):
        FrontierFolder(tmp_path)


def test_a_second_writer_is_refused_and_one_that_waited_keeps_all_rows(tmp_path):
    late = FrontierFolder(tmp_path)
    filled(tmp_path)
    with FrontierFolder(tmp_path), pytest.raises(RacError, match=r"in use by process \d+; wait"):
        late.__enter__()
    with late:
        late.add(row("late"), [])
    assert [row["label"] for row in FrontierFolder(tmp_path).rows] == ["a", "b/ü", "late"]


def test_a_folder_without_results_or_that_cannot_be_written(tmp_path):
    with pytest.raises(RacError, match="holds no results; make them with"):
        FrontierFolder.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RacError, match="cannot be written to"):
        FrontierFolder(tmp_path / "file").__enter__()


def test_names_of_files_keep_labels_apart():
    names = {slug(label) for label in ("2:4", "2-4", "50 %", "50", "../x", "ü" * 300, "")}
    assert len(names) == 7
    assert all(len(name) <= 70 and "/" not in name and ".." not in name for name in names)
