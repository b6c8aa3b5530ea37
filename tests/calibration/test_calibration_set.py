import json
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.calibration import trace_budget as collecting
from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.errors import RacError
from rac_modifier.model_tools import on_accelerator
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.store import TraceStore
from tests.tiny import entry, tiny_model, tiny_tokenizer


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
    assert made.as_dict()["trace_stores"]["traces"]["sha256"] == TraceStore.read(trace_store).sha256()


def test_the_choice_is_made_over_the_whole_store(build, trace_store):
    """A large store is sampled by the seed, not read from its front."""
    front = [(*t.prompt_ids, *t.completion_ids) for t in TraceStore.read(trace_store)][:9]
    assert not {s.ids for s in build().loader.sequences} <= set(front)


def test_prompts_and_generic_text_come_beside_traces(build):
    made = build(mixture={"traces": 0.5, "prompts": 0.25, "generic": 0.25}, generic={"sequence_tokens": 50})
    by_kind = Counter()
    for sequence in made.loader.sequences:
        by_kind[sequence.kind] += len(sequence.ids)
    assert by_kind == {"traces": 300, "prompts": 150, "generic": 150}


def test_without_traces_nothing_is_sampled(build, tmp_path):
    store = tmp_path / "never.jsonl"
    made = build(entry(store)["traces"], mixture={"prompts": 1.0})
    assert made.as_dict()["trace_stores"] == {}
    assert not store.exists()


def test_prompts_are_rendered_as_those_of_traces(build, trace_store):
    prompts = {s.ids for s in build(mixture={"prompts": 1.0}).loader.sequences}
    rendered = {t.prompt_ids for t in TraceStore.read(trace_store)}
    assert len(prompts & rendered) >= len(prompts) - 1


def test_rac_without_a_trace_token_is_refused(tmp_path, model, tokenizer, trace_store):
    """Prompts that fill max_sequence_tokens leave only themselves, which must not pass as reasoning-aware."""
    long = "what is " + "1 + " * 30 + "1?"
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"problem": f"{i} {long}"}) + "\n" for i in range(20)))
    traces = {**entry(tmp_path / "s.jsonl")["traces"], "problems": {"source": str(tmp_path / "p.jsonl")}}
    with pytest.raises(RacError, match="no token of any"):
        build_calibration_set(
            model,
            tokenizer,
            TraceSettings(**traces),
            CalibrationSettings(tokens=150, max_sequence_tokens=16, held_out_tokens=0),
            progress=False,
        )


def test_traces_are_collected_until_the_budget_is_met_as_they_will_be_cut(build, tmp_path):
    store = tmp_path / "s.jsonl"
    made = build(entry(store)["traces"], tokens=400, max_sequence_tokens=48)
    assert made.loader.composition.tokens == 400
    assert made.loader.composition.truncated_sequences > 5
    held = TraceStore.read(store)
    assert held.counts.tokens > 400
    assert sum(min(t.tokens, 48) for t in held) < 400 + 16 * 48  # and hardly further


def test_a_tokenizer_without_a_pad_token_does(model, trace_store):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    made = build_calibration_set(
        model,
        tokenizer,
        TraceSettings(**entry(trace_store)["traces"]),
        CalibrationSettings(tokens=600, held_out_tokens=0),
        progress=False,
    )
    assert made.loader.composition.tokens == 600


def test_a_model_on_the_cpu_visits_the_accelerator_and_comes_back(monkeypatch):
    moves = []
    model = tiny_model()
    monkeypatch.setattr(type(model), "to", lambda self, device: moves.append(str(device)))
    monkeypatch.setattr(collecting.torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(collecting.torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(KeyError), on_accelerator(model):
        raise KeyError
    assert moves == ["cuda", "cpu"]
    model.hf_device_map = {"": "cpu"}  # placed by the user: stays where it is
    with on_accelerator(model):
        pass
    assert moves == ["cuda", "cpu"]
