"""A store as Parquet."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.traces.export import export_parquet
from rac_modifier.traces.store import TraceStore
from tests.traces.long_store import HEADER


def test_parquet_holds_the_ids_as_they_are(long_store, byte_tokenizer, tmp_path):
    import datasets

    assert export_parquet(long_store, tmp_path / "out.parquet") == len(long_store) == 2499
    rows = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out.parquet"), split="train", cache_dir=str(tmp_path)
    )
    for one, row in zip(long_store, rows, strict=True):
        assert row["id"] == one.id
        assert (tuple(row["prompt_ids"]), tuple(row["completion_ids"])) == (
            one.prompt_ids,
            one.completion_ids,
        )
        assert (row["question"], row["answer"], row["finish_reason"]) == (
            one.question,
            one.answer,
            one.finish_reason,
        )
    assert [path.name for path in tmp_path.glob("out*")] == ["out.parquet"]


def test_text_shows_tags_and_eos(long_store, byte_tokenizer, tmp_path):
    import pyarrow.parquet

    export_parquet(long_store, tmp_path / "out.parquet", byte_tokenizer)
    first = pyarrow.parquet.read_table(tmp_path / "out.parquet").slice(1, 1).to_pylist()[0]
    assert first["completion"] == "12 </think>\\boxed{1}<|end|>"
    assert first["prompt"] == byte_tokenizer.decode([3, 4])


def test_what_cannot_be_exported(long_store, tmp_path):
    with pytest.raises(RacError, match=r"does not end in \.parquet"):
        export_parquet(long_store, tmp_path / "out.csv")
    with pytest.raises(RacError, match="its folder does not exist"):
        export_parquet(long_store, tmp_path / "none" / "out.parquet")
    with (
        TraceStore.open_append(tmp_path / "e.jsonl", HEADER) as empty,
        pytest.raises(RacError, match="holds no traces"),
    ):
        export_parquet(empty, tmp_path / "out.parquet")


def test_a_full_disk_leaves_no_half_file(long_store, tmp_path, monkeypatch):
    def full(_from, _to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RacError, match=r"out\.parquet' cannot be written .*make room"):
        export_parquet(long_store, tmp_path / "out.parquet")
    assert list(tmp_path.glob("out*")) == []
