"""Traces as a dataset: the ids of the store, what is prompt and what is completion, rows of one
length."""

import json
import subprocess
import sys

import datasets
import pytest

import rac_modifier
from rac_modifier.calibration.dataset import export_store
from rac_modifier.errors import RacError
from rac_modifier.traces.store import TraceStore
from tests.tiny import byte_tokenizer, entry
from tests.traces.long_store import HEADER, fill


def dataset(model, trace_store, **options):
    sampling = entry(trace_store)["traces"]["sampling"]
    options = {"tokens": 400, "sampling": sampling, "store": trace_store, **options}
    return rac_modifier.trace_dataset(model, **options)


def test_rows_are_the_ids_of_the_store_and_completions_are_marked(tiny_folder, trace_store):
    whole = TraceStore.read(trace_store).counts.tokens  # nothing is held out
    table = dataset(tiny_folder, trace_store, tokens=whole)
    assert table.column_names == ["input_ids", "attention_mask", "loss_mask"]
    stored = {(*t.prompt_ids, *t.completion_ids): t for t in TraceStore.read(trace_store)}
    for row in table:
        trace = stored[tuple(row["input_ids"])]
        assert row["loss_mask"] == [0] * len(trace.prompt_ids) + [1] * len(trace.completion_ids)
        assert row["attention_mask"] == [1] * trace.tokens
    record = json.loads(table.info.description)
    assert record["sha256"] == TraceStore.read(trace_store).sha256()
    assert (record["rows"], record["tokens"]) == (len(stored), whole)
    assert record["store"] == trace_store.name


def test_rows_of_one_length_hold_the_same_tokens(tiny_folder, trace_store):
    ragged, ones, rows = (dataset(tiny_folder, trace_store, length=n) for n in (None, 1, 64))
    assert {len(row["input_ids"]) for row in rows} == {64}
    assert ones["input_ids"] == [[i] for row in ragged["input_ids"] for i in row]
    lengths = [len(ids) for ids in ragged["input_ids"]]
    assert sum(lengths[:-1]) < 400 <= sum(lengths)
    for column in ("input_ids", "loss_mask"):
        tokens, cut = ([i for row in table[column] for i in row] for table in (ragged, rows))
        assert tokens[: len(cut)] == cut
        assert len(tokens) - len(cut) < 64


def test_a_model_in_memory_samples_what_is_missing(model, tokenizer, tmp_path):
    store = tmp_path / "s.jsonl"
    with pytest.raises(RacError, match="needs its tokenizer"):
        dataset(model, store)
    rows = dataset(model, store, tokenizer=tokenizer, tokens=200)
    stored = {(*t.prompt_ids, *t.completion_ids) for t in TraceStore.read(store)}
    assert {tuple(ids) for ids in rows["input_ids"]} <= stored


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 0}, "trace_dataset: tokens"),
        ({"length": 0}, "length=0: a row holds at least one token"),
        ({"sampling": {"temprature": 1}}, "temperature"),
    ],
)
def test_a_wrong_setting_is_named(tiny_folder, trace_store, options, words):
    with pytest.raises(RacError, match=words):
        dataset(tiny_folder, trace_store, **options)


BLOCKED = """
import sys
import rac_modifier  # before: it looks into sys.modules
for name in ("llmcompressor", "vllm", "compressed_tensors", "psutil", "typer", "openai"):
    sys.modules[name] = None
from tests.sampling.fake_server import FakeServer
server = FakeServer()
rows = rac_modifier.trace_dataset(
    sys.argv[1], tokens=300, store=sys.argv[2],
    server={"base_urls": [server.url], "verify_model": False},
    sampling={"max_new_tokens": 20},
)
server.close()
print(sum(map(len, rows["input_ids"])) >= 300, "torch.nn" in sys.modules)
"""


def test_it_needs_neither_llmcompressor_nor_vllm(tiny_folder, tmp_path):
    """With a server that samples; the extra [traces] brings what is imported."""
    command = [sys.executable, "-c", BLOCKED, str(tiny_folder), str(tmp_path / "s.jsonl")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.stdout == "True True\n", ended.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("store") / "s.jsonl", byte_tokenizer(), 300)


@pytest.mark.parametrize(("suffix", "loader"), [("parquet", "parquet"), ("jsonl", "json")])
def test_a_file_holds_the_traces_and_what_is_known_about_them(store, tmp_path, suffix, loader):
    path = tmp_path / f"out.{suffix}"
    assert export_store(store, path, tokenizer=byte_tokenizer(), text=True) == len(store) == 299
    rows = datasets.load_dataset(
        loader, data_files=str(path), split="train", cache_dir=str(tmp_path)
    )
    for trace, row in zip(store, rows, strict=True):
        assert tuple(row["input_ids"]) == (*trace.prompt_ids, *trace.completion_ids)
        assert sum(row["loss_mask"]) == len(trace.completion_ids)
        known = (row["id"], row["question"], row["answer"], row["finish_reason"])
        assert known == (trace.id, trace.question, trace.answer, trace.finish_reason)
    assert rows[1]["completion"] == "12 </think>\\boxed{1}<|end|>"
    assert [file.name for file in tmp_path.glob("out*")] == [path.name]


def test_a_text_for_llama_imatrix_has_the_tokens_of_the_traces(store, tmp_path):
    path, tokenizer = tmp_path / "calibration.txt", byte_tokenizer()
    assert export_store(store, path, tokenizer=tokenizer, file_format="imatrix") == len(store)
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ids == [i for trace in store for i in (*trace.sequence[0], line_break)]


def test_names_that_the_commands_take_work_and_a_wrong_one_is_refused(tmp_path, monkeypatch):
    sampling = {"max_new_tokens": 16, "batch_size": 4}
    table = rac_modifier.trace_dataset(
        "reasoner", tokens=60, store=tmp_path / "s.jsonl", sampling=sampling
    )
    assert json.loads(table.info.description)["model"] == "reasoner"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RacError, match=r"'reasner' cannot be loaded .*give a model folder"):
        rac_modifier.trace_dataset("reasner", tokens=60)


def test_what_cannot_be_exported(store, tmp_path, monkeypatch):
    with pytest.raises(RacError, match=r"name a file that ends in \.parquet or \.jsonl"):
        export_store(store, tmp_path / "out.csv")
    with pytest.raises(RacError, match="or give --format imatrix"):
        export_store(store, tmp_path / "out.jsonl", file_format="gguf")
    with pytest.raises(RacError, match="its folder does not exist"):
        export_store(store, tmp_path / "none" / "out.parquet")
    other, link = fill(tmp_path / "s.jsonl", byte_tokenizer(), 3), tmp_path / "link.parquet"
    link.symlink_to(other.path)
    before = other.path.read_bytes()
    for path in (other.path, link):
        with pytest.raises(RacError, match="is a trace store, and stays as it is; name another"):
            export_store(store, path)
    assert other.path.read_bytes() == before
    with (
        TraceStore.open_append(tmp_path / "e.jsonl", HEADER) as empty,
        pytest.raises(RacError, match="kept 0 of 0, and no row to write"),
    ):
        export_store(empty, tmp_path / "out.jsonl")

    def full(_from, _to):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RacError, match=r"out\.parquet' cannot be written .*make room"):
        export_store(store, tmp_path / "out.parquet")
    assert list(tmp_path.glob("out*")) == []
