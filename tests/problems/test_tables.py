"""Every kind of file and a dataset, read in one place."""

import json
import socket

import datasets
import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import open_table, stream_rows

ROWS = [
    {"problem": "1 + 1?", "answer": 2, "note": None},
    {"problem": "é\n2024-01-05", "answer": -3, "note": "x"},
    {"problem": "3", "answer": 0, "note": "y"},
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        path.write_text({".jsonl": lines(ROWS), ".json": json.dumps(ROWS, indent=1)}[path.suffix])
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "[a] *?.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path, monkeypatch):
    """Without a network, as the values were written; a name is a name, not a pattern."""
    path = write(tmp_path / name)

    def no_network(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    table = open_table(path, label="file")
    assert table.column_names == ["problem", "answer", "note"]
    assert list(table) == ROWS
    assert list(stream_rows(path, label="file")) == ROWS


def test_columns_with_the_names_of_agent_traces_stay_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"type": "user", "message": {"a": 1}}, {"type": "user", "message": {"b": [2]}}]
    path.write_text(lines(rows))
    assert open_table(str(path), label="file").column_names == ["type", "message"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b"", "is empty; name another file"),
        ("a.jsonl", b'{"a": "x"}\n{broken\n', r"could not be read \(.* one JSON object per line"),
        ("a.json", b'[{"problem": "x"},', r"could not be read \(.*must hold a list of objects"),
        ("a.parquet", b"text", r"could not be read \(ArrowInvalid.*must hold Parquet"),
        ("a.txt", b"\xff\xfe", r"a\.txt' could not be read .*it must hold text in UTF-8"),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    for read in (open_table, stream_rows):
        with pytest.raises(RacError, match=f"^my file .*{message}"):
            list(read(str(tmp_path / name), label="my file"))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    for name in ("a.jsonl", "a.json", "a.parquet", "a.txt"):
        with pytest.raises(RacError, match=rf"my file '{name}': no such file \(.*{tmp_path}\)"):
            open_table(name, label="my file")


def test_a_dataset_is_loaded_by_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_table("some/data", label="dataset", config="all", split="test")) == ROWS
    assert list(stream_rows("some/data", label="dataset")) == ROWS
    assert asked == [("some/data", "all", "test", False), ("some/data", None, "train", True)]


def test_a_dataset_that_cannot_be_loaded_names_the_ways_out(monkeypatch):
    def load_dataset(*_args, **_kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        RacError,
        match=r"dataset 'no/body' \(config None, split 'train'\) could not be loaded "
        r"\(ConnectionError: no route to the hub\).*"
        "name a local file or a built-in source",
    ):
        open_table("no/body", label="dataset")
