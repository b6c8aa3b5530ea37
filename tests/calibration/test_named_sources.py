"""Several sources in one mixture, what is selected from each, and what their traces weigh."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.store import TraceStore
from tests.tiny import entry, tiny_tokenizer

SAMPLING = {"temperature": 1.0, "max_new_tokens": 20, "batch_size": 16}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def build(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stores go by default

    def build(traces, **calibration):
        settings = CalibrationSettings(**{"tokens": 600, "held_out_tokens": 0, **calibration})
        return build_calibration_set(
            model, tokenizer, TraceSettings(**{"sampling": SAMPLING, **traces}), settings, False
        )

    return build


def test_the_parts_are_counted_in_real_tokens_and_recorded(build, tmp_path):
    (tmp_path / "code.jsonl").write_text("".join(json.dumps({"prompt": f"write {i}"}) + "\n" for i in range(60)))
    (tmp_path / "c4.txt").write_text("some words of the web " * 50)
    made = build(
        {"sources": {"code": {"problems": {"source": "code.jsonl"}, "store": "code-traces.jsonl"}}},
        mixture="traces:arithmetic@0.5, traces:code@0.2, prompts:code@0.1, text:c4.txt@0.2",
        generic={"sequence_tokens": 40},
    )
    record = made.as_dict()
    tokens = {name: part["tokens"] for name, part in record["calibration"]["parts"].items()}
    assert tokens == {"traces:arithmetic": 300, "traces:code": 120, "prompts:code": 60, "generic:c4.txt": 120}
    assert record["calibration"]["tokens"] == 600
    assert set(record["trace_stores"]) == {"traces:arithmetic", "traces:code"}
    assert record["trace_stores"]["traces:code"]["path"] == "code-traces.jsonl"
    assert record["trace_stores"]["traces:arithmetic"]["path"].startswith("rac_traces")
    assert TraceStore.read("code-traces.jsonl").header.problems.source == "code.jsonl"


def test_traces_are_held_out_of_each_part_but_not_of_another_models(build):
    made = build({}, mixture="traces:arithmetic@0.5, traces:reasoning-gym:gcd@0.5", held_out_tokens=400)
    held = {len(pool.held_out) for pool in made.pools.values()}
    assert min(held) >= 4
    taken = {s.ids for s in made.loader.sequences}
    assert taken.isdisjoint((*t.prompt_ids, *t.completion_ids) for t in made.held_out)
    record = made.as_dict()["trace_stores"]["traces:arithmetic"]["selection"]
    store = made.pools["traces:arithmetic"].store
    assert record["of"] == len(store) - len(made.pools["traces:arithmetic"].held_out)
    source = {"problems": {"source": "arithmetic"}, "store": str(store.path), "allow_off_policy": True}
    made = build({"sources": {"other": source}}, mixture="traces:other@1", tokens=200, held_out_tokens=400)
    assert made.held_out == ()


def test_an_unknown_name_is_refused_before_anything_is_sampled(build, tmp_path):
    with pytest.raises(RacError, match="traces:maths, which is not among"):
        build({}, mixture="traces@0.5, traces:maths@0.5")
    assert not (tmp_path / "rac_traces").exists()


def test_collection_goes_on_until_what_is_selected_fills_the_budget(build):
    made = build({"store": "s.jsonl", "select": {"finished": True, "max_tokens": 19}}, tokens=900)
    held = list(TraceStore.read("s.jsonl"))
    fit = [t for t in held if t.finish_reason == "stop" and len(t.completion_ids) <= 19]
    assert sum(t.tokens for t in fit) >= 900
    assert len(fit) < len(held)
    assert {s.ids for s in made.loader.sequences if len(s.ids) > 1} - {(*t.prompt_ids, *t.completion_ids) for t in fit} in (
        set(), {s.ids for s in made.loader.sequences if not s.finished},
    )  # fmt: skip
    record = made.as_dict()["trace_stores"]["traces"]["selection"]
    assert (record["kept"], record["of"]) == (len(fit), len(held))
    assert sum(record["dropped"].values()) == len(held) - len(fit)


def test_a_selection_that_keeps_nothing_ends_with_an_error(build):
    with pytest.raises(RacError, match=r"traces: traces\.select kept 0 of .* wrong.*least_share \(0\.02\)"):
        build({"select": {"answers": "correct"}}, tokens=300)


def test_problems_that_end_before_a_selection_is_met_say_so(build):
    with pytest.raises(RacError, match=r"used up.* traces\.select kept 0 of \d+: \d+ wrong, 0 tokens of 300"):
        build({"select": {"answers": "correct"}, "problems": {"source": "arithmetic", "limit": 20}}, tokens=300)


def test_inverse_length_gives_each_trace_the_same_say(build):
    made = build({"store": "s.jsonl"}, trace_weighting="inverse_length")
    stored = {(*t.prompt_ids, *t.completion_ids) for t in TraceStore.read("s.jsonl")}
    whole = [s for s in made.loader.sequences if s.ids in stored]  # all but the one that is cut where the budget ends
    assert len({len(s.ids) for s in whole}) > 3
    totals = [sum(s.weights(made.loader.settings)) for s in whole]
    assert max(totals) == pytest.approx(min(totals))


def test_a_function_of_ones_own_weighs_traces(build):
    def by_end(trace):
        return 2 if trace.finish_reason == "stop" else 1

    made = build({"store": "s.jsonl"}, trace_weighting=by_end)
    by_ids = {(*t.prompt_ids, *t.completion_ids): t.finish_reason for t in TraceStore.read("s.jsonl")}
    weights = {by_ids[s.ids]: s.weight for s in made.loader.sequences if s.ids in by_ids}
    assert weights["stop"] == pytest.approx(2 * weights["length"])
    mean = sum(s.weight * len(s.ids) for s in made.loader.sequences) / 600
    assert mean == pytest.approx(1, abs=0.05)  # the last trace is cut after it was weighed
    with pytest.raises(RacError, match=r"gives trace .* the weight -1"):
        build({"store": "s.jsonl"}, trace_weighting=lambda trace: -1)


def test_traces_that_all_weigh_nothing_are_refused(build):
    with pytest.raises(RacError, match="every trace of the calibration set weighs 0"):
        build({"store": "s.jsonl"}, trace_weighting="correct")  # a random model is never right


def test_only_what_is_calibrated_on_is_held_in_memory(build, monkeypatch, trace_store):
    """A large store with a small budget: whole traces are made into sequences for the budget alone."""
    from rac_modifier.calibration import trace_pool as pools

    made = []
    monkeypatch.setattr(pools, "trace_sequence", lambda *args: made.append(1) or original(*args))
    original = __import__("rac_modifier.calibration.mixture", fromlist=["trace_sequence"]).trace_sequence
    build(entry(trace_store)["traces"], tokens=100)
    assert 0 < len(made) < 10 < len(TraceStore.read(trace_store))


def test_a_tokenizer_is_not_asked_for_text_unless_needed(model, trace_store):
    tokenizer = tiny_tokenizer()
    tokenizer.decode = None
    settings = TraceSettings(**entry(trace_store)["traces"])
    assert build_calibration_set(model, tokenizer, settings, CalibrationSettings(tokens=300), progress=False).pools
