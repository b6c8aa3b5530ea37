import json

import pytest
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.errors import RacError
from rac_modifier.processes import Processes
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.store import TraceStore
from tests.meeting import together
from tests.tiny import entry


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def build(model, tokenizer, trace_store):
    def build(traces=None, **calibration):
        traces = TraceSettings(**(traces or entry(trace_store)["traces"]))
        return build_calibration_set(
            model,
            tokenizer,
            traces,
            CalibrationSettings(**{"tokens": 600, "held_out_tokens": 0, **calibration}),
            progress=False,
        )

    return build


def test_the_sequences_are_the_stored_ids(build, trace_store):
    made = build()
    stored = {(*t.prompt_ids, *t.completion_ids) for t in TraceStore.read(trace_store)}
    whole = [s for s in made.loader.sequences if s.ids in stored]
    assert len(whole) >= len(made.loader.sequences) - 1  # one may be cut to meet the budget
    assert made.as_dict()["calibration"]["tokens"] == 600
    assert (
        made.as_dict()["trace_stores"]["traces"]["sha256"] == TraceStore.read(trace_store).sha256()
    )


def test_its_identity_is_that_of_the_sequences_and_names_the_stores(build, trace_store):
    one, two, other = (build(seed=seed).identity() for seed in (0, 0, 1))
    assert one == two
    assert one["calibration set"] != other["calibration set"]
    said = {f"traces: {trace_store}": f"sha256 {TraceStore.read(trace_store).sha256()[:12]}"}
    assert one["trace stores"] == other["trace stores"] == said
    assert build(mixture={"prompts": 1.0}).identity()["trace stores"] == {}


def test_a_warning_says_that_most_traces_were_cut(build):
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        composition = build().loader.composition
        build(mixture={"prompts": 1.0})
    finally:
        logger.remove(handler)
    assert composition.unfinished_share > 0.5  # the tiny model hardly ever ends an answer
    (warning,) = [
        text for text in said if "of the traces were cut at traces.sampling.max_new_tokens" in text
    ]
    assert f"{composition.unfinished_share:.0%} of the traces" in warning


def test_prompts_are_rendered_as_those_of_traces(build, trace_store):
    prompts = {s.ids for s in build(mixture={"prompts": 1.0}).loader.sequences}
    rendered = {t.prompt_ids for t in TraceStore.read(trace_store)}
    assert len(prompts & rendered) >= len(prompts) - 1


def test_rac_without_a_trace_token_is_refused(tmp_path, model, tokenizer, trace_store):
    """Prompts that fill max_sequence_tokens leave only themselves, which must not pass as reasoning-aware."""
    long = "what is " + "1 + " * 30 + "1?"
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"problem": f"{i} {long}"}) + "\n" for i in range(20))
    )
    traces = {
        **entry(tmp_path / "s.jsonl")["traces"],
        "problems": {"source": str(tmp_path / "p.jsonl")},
    }
    with pytest.raises(RacError, match="no token of any"):
        build_calibration_set(
            model,
            tokenizer,
            TraceSettings(**traces),
            CalibrationSettings(tokens=150, max_sequence_tokens=16, held_out_tokens=0),
            progress=False,
        )


def test_the_parts_are_counted_in_real_tokens_and_recorded(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stores are written by default
    (tmp_path / "code.jsonl").write_text(
        "".join(json.dumps({"prompt": f"write {i}"}) + "\n" for i in range(60))
    )
    (tmp_path / "c4.txt").write_text("some words of the web " * 50)
    sampling = {"temperature": 1.0, "max_new_tokens": 20, "batch_size": 16}
    code = {"problems": {"source": "code.jsonl"}}
    made = build(
        {"sampling": sampling, "sources": {"code": code}},
        mixture="traces:arithmetic@0.5, traces:code@0.2, prompts:code@0.1, text:c4.txt@0.2",
        generic={"sequence_tokens": 40},
    )
    record = made.as_dict()
    tokens = {name: part["tokens"] for name, part in record["calibration"]["parts"].items()}
    assert tokens == {
        "traces:arithmetic": 300,
        "traces:code": 120,
        "prompts:code": 60,
        "generic:c4.txt": 120,
    }
    assert record["calibration"]["tokens"] == 600
    assert set(record["trace_stores"]) == {"traces:arithmetic", "traces:code"}
    store = record["trace_stores"]["traces:code"]["path"]
    assert store.startswith("rac_traces")
    assert TraceStore.read(store).header.problems.source == "code.jsonl"


def test_the_record_holds_how_the_prompts_of_each_part_were_made(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sampling = {
        "temperature": 1.0,
        "max_new_tokens": 20,
        "batch_size": 16,
        "system_prompt": "Be brief.",
    }
    traces = {"sampling": {**sampling, "thinking": False}}
    made = build(traces, mixture="traces@0.5, prompts:arithmetic@0.3, generic@0.2")
    prompt = {"template": "chat", "system_prompt": "Be brief.", "thinking": False}
    assert made.as_dict()["prompts"] == {"prompts:arithmetic": prompt, "traces": prompt}


def test_several_processes_get_the_set_of_one(model, tokenizer, tmp_path):
    """They sample together, and the first one chooses; the store is that of one process, too."""
    calibration = CalibrationSettings(
        tokens=300, held_out_tokens=60, mixture="traces@0.8, generic@0.2"
    )

    def build(store, processes):
        settings = TraceSettings(**entry(store)["traces"])
        return build_calibration_set(model, tokenizer, settings, calibration, False, 100, processes)

    alone = build(tmp_path / "alone.jsonl", Processes())
    first, *others = together(3, lambda processes: build(tmp_path / "three.jsonl", processes))
    assert (tmp_path / "three.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert first.held_out == alone.held_out
    assert first.pools
    assert len(alone.reserved) >= 1
    for made in (first, *others):
        assert made.loader.sequences == alone.loader.sequences
        assert made.loader.composition == alone.loader.composition
        assert made.loader.sha256() == alone.loader.sha256()
        assert made.reserved == alone.reserved
    assert not any(made.pools for made in others)
