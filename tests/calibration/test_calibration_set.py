import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from loguru import logger

from rac_modifier.calibration.calibration_set import CalibrationSet, build_calibration_set
from rac_modifier.distributed.processes import Processes
from rac_modifier.settings.calibration import CalibrationSettings, TraceSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import TraceStore
from tests.meeting import together
from tests.tiny import entry


@pytest.fixture
def build(model, tokenizer, trace_store):
    def build(traces=None, **calibration):
        traces = TraceSettings(**(traces or entry(trace_store)["traces"]))
        return build_calibration_set(
            model,
            tokenizer,
            traces,
            CalibrationSettings(**{"tokens": 600, "held_out_tokens": 0, **calibration}),
        )

    return build


def test_the_sequences_are_the_stored_ids(build, trace_store):
    built = build()
    store = TraceStore.read(trace_store)
    stored = {(*t.prompt_ids, *t.completion_ids) for t in store}
    sequences = built.loader.sequences
    assert sum(s.ids in stored for s in sequences) >= len(sequences) - 1  # one is cut to fit
    assert built.as_dict()["calibration"]["tokens"] == 600
    assert built.as_dict()["trace_stores"]["traces"]["sha256"] == store.sha256()
    prompts = build(mixture={"prompts": 1.0})
    rendered = {s.ids for s in prompts.loader.sequences}
    assert len(rendered & {t.prompt_ids for t in store}) >= len(rendered) - 1, "as of traces"
    traces = entry(trace_store)["traces"]
    reseeded = {**traces, "sampling": {**traces["sampling"], "seed": 1}}
    other = build(reseeded, mixture={"prompts": 1.0})
    assert len(rendered & {s.ids for s in other.loader.sequences}) < len(rendered) / 2
    generic = [build(mixture={"generic": 1.0}, seed=seed).loader.sequences for seed in (0, 1)]
    assert {s.ids for s in generic[0]} != {s.ids for s in generic[1]}
    first, again, other = (build(seed=seed).identity() for seed in (0, 0, 1))
    assert first == again
    assert first["calibration set"] != other["calibration set"]
    stores = {f"traces: {trace_store}": f"sha256 {store.sha256()[:12]}"}
    assert first["trace stores"] == other["trace stores"] == stores
    assert prompts.identity()["trace stores"] == {}


def test_no_prompt_of_a_held_out_trace_is_calibrated_on(build):
    built = build(mixture={"traces": 0.5, "prompts": 0.5}, held_out_tokens=100)
    held_out = {trace.prompt_ids for trace in built.held_out}
    prompts = {s.ids for s in built.loader.sequences if s.kind == "prompts"}
    assert held_out
    assert prompts
    assert not held_out & prompts


def test_a_beginning_of_parts_in_turn_holds_the_same_share_of_each():
    lengths = {"a": [10] * 30, "b": [5, 25] * 10, "c": []}
    parts = [
        [
            Trace(f"{i}#0", part, (1,), (2,) * (n - 1), "stop", 0, "?", None)
            for i, n in enumerate(ns)
        ]
        for part, ns in lengths.items()
    ]
    pools = {
        name: SimpleNamespace(reserved=part) for name, part in zip(lengths, parts, strict=True)
    }
    merged = CalibrationSet(None, pools=pools).reserved
    assert len(merged) == 50
    for part in parts:
        assert [trace for trace in merged if trace in part] == part
    tokens = dict.fromkeys(lengths, 0)
    for trace in merged[:-1]:
        tokens[trace.problem_id] += trace.tokens
        assert abs(tokens["a"] - tokens["b"]) <= 25


def test_the_parts_are_counted_in_real_tokens_and_recorded(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stores are written by default
    (tmp_path / "code.jsonl").write_text(
        "".join(json.dumps({"prompt": f"write {i}"}) + "\n" for i in range(60))
    )
    (tmp_path / "c4.txt").write_text("some words of the web " * 50)
    sampling = {"temperature": 1.0, "max_new_tokens": 20, "system_prompt": "Be brief."}
    built = build(
        {"sampling": sampling},
        mixture={
            "traces:arithmetic": 0.5,
            "traces:code.jsonl": 0.2,
            "prompts:code.jsonl": 0.1,
            "generic": 0.2,
        },
        generic={"source": "c4.txt", "sequence_tokens": 40},
    )
    record = built.as_dict()
    tokens = {name: part["tokens"] for name, part in record["calibration"]["parts"].items()}
    assert tokens == {
        "traces:arithmetic": 300,
        "traces:code.jsonl": 120,
        "prompts:code.jsonl": 60,
        "generic": 120,
    }
    assert record["calibration"]["tokens"] == 600
    assert set(record["trace_stores"]) == {"traces:arithmetic", "traces:code.jsonl"}
    path = record["trace_stores"]["traces:code.jsonl"]["path"]
    assert path.startswith("rac_traces")
    assert TraceStore.read(path).header.problems.source == "code.jsonl"
    prompt = {"template": "chat", "system_prompt": "Be brief.", "thinking": True}
    names = {"traces:arithmetic", "traces:code.jsonl", "prompts:code.jsonl"}
    assert record["prompts"] == dict.fromkeys(names, prompt)


def test_a_warning_says_that_half_of_the_traces_were_cut(build, trace_store, tmp_path):
    warnings, finished, store = [], tmp_path / "finished.jsonl", TraceStore.read(trace_store)
    with TraceStore.open_append(finished, store.header) as copy:
        copy.append_many([replace(trace, finish_reason="stop") for trace in store])
    sink = logger.add(warnings.append, format="{message}", level="WARNING")
    build(entry(finished)["traces"])
    assert "few endings of answers" not in str(warnings)
    build(entry(trace_store)["traces"])
    assert "few endings of answers" in str(warnings)
    logger.remove(sink)


def test_several_processes_get_the_set_of_one(model, tokenizer, tmp_path):
    """The first one samples; the store is that of one process, too."""
    calibration = CalibrationSettings(
        tokens=300, held_out_tokens=60, mixture={"traces": 0.8, "generic": 0.2}
    )

    def build(store, processes):
        settings = TraceSettings(**entry(store)["traces"])
        return build_calibration_set(model, tokenizer, settings, calibration, 100, processes)

    alone = build(tmp_path / "alone.jsonl", Processes())
    first, *others = together(2, lambda processes: build(tmp_path / "two.jsonl", processes))
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert first.held_out == alone.held_out
    assert first.pools
    assert len(alone.reserved) >= 1
    for built in (first, *others):
        assert built.loader.sequences == alone.loader.sequences
        assert built.counts == alone.counts
        assert built.loader.sha256() == alone.loader.sha256()
        assert built.reserved == alone.reserved
    assert not any(built.pools for built in others)
