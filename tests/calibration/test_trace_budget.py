from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier import model_tools
from rac_modifier.calibration import trace_budget
from rac_modifier.calibration.trace_budget import collect_for_calibration
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.store import TraceStore
from tests.tiny import entry

SAMPLING = {"temperature": 1.0, "max_new_tokens": 20, "batch_size": 16}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def collect(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stores are written by default

    def collect(traces, **calibration):
        settings = CalibrationSettings(**{"tokens": 600, "held_out_tokens": 0, **calibration})
        return collect_for_calibration(
            model,
            tokenizer,
            TraceSettings(**{"sampling": SAMPLING, **traces}),
            settings,
            progress=False,
        )

    return collect


def test_each_part_made_of_traces_gets_its_share_from_a_store_of_its_own(collect):
    pools = collect(
        {}, mixture="traces:arithmetic@0.5, traces:reasoning-gym:gcd@0.25, prompts@0.25"
    )
    assert {
        key: pool.usable_tokens() >= tokens
        for (key, pool), tokens in zip(pools.items(), (300, 150), strict=True)
    } == {
        "traces:arithmetic": True,
        "traces:reasoning-gym:gcd": True,
    }
    assert len({pool.store.path for pool in pools.values()}) == 2
    assert max(pool.usable_tokens() for pool in pools.values()) < 600


def test_a_store_that_holds_exactly_enough_is_only_read(collect, trace_store, tmp_path):
    (tmp_path / "exact.jsonl").write_bytes(trace_store.read_bytes())
    settings = {**entry(tmp_path / "exact.jsonl")["traces"]}
    pool = collect(settings, tokens=TraceStore.read(trace_store).counts.tokens)["traces"]
    assert pool.usable_tokens() == TraceStore.read(trace_store).counts.tokens
    assert pool.store.path.read_bytes() == trace_store.read_bytes()


@pytest.fixture
def small_accelerator(model, monkeypatch):
    """An accelerator that the model does not fit on, and that it must not be moved to."""
    for module in (model_tools, trace_budget):
        monkeypatch.setattr(module, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(type(model), "to", lambda self, device: pytest.fail(f"moved to {device}"))


@pytest.mark.usefixtures("small_accelerator")
def test_a_model_is_not_moved_where_the_store_holds_enough(collect, trace_store):
    assert collect(entry(trace_store)["traces"], tokens=300)["traces"].usable_tokens() >= 300


@pytest.mark.usefixtures("small_accelerator")
@pytest.mark.parametrize("there", [False, True], ids=["no store", "a store with too few"])
def test_a_model_that_does_not_fit_is_refused_before_it_samples(
    collect, trace_store, tmp_path, there
):
    if there:
        (tmp_path / "own.jsonl").write_bytes(trace_store.read_bytes())
    with pytest.raises(
        RacError,
        match=r"are free on cuda, .*: fill the trace store .*rac traces collect MODEL .*--serve",
    ):
        collect(entry(tmp_path / "own.jsonl")["traces"], tokens=10**5)
    if there:
        assert (tmp_path / "own.jsonl").read_bytes() == trace_store.read_bytes()
    else:
        assert not (tmp_path / "own.jsonl").exists()


def test_traces_are_held_out_of_each_part_beside_its_share(collect):
    pools = collect(
        {}, mixture="traces:arithmetic@0.5, traces:reasoning-gym:gcd@0.5", held_out_tokens=400
    )
    for pool in pools.values():
        assert len(pool.held_out) >= 4
        assert pool.kept_out_tokens >= 200
        assert pool.usable_tokens() >= 300
        assert pool.selection.total == len(pool.store) - len(pool.held_out)


def test_an_unknown_name_is_refused_before_anything_is_sampled(collect, tmp_path):
    with pytest.raises(RacError, match="traces:maths, which is not among"):
        collect({}, mixture="traces@0.5, traces:maths@0.5")
    assert not (tmp_path / "rac_traces").exists()


def test_a_mixture_without_traces_has_nothing_to_collect(collect):
    with pytest.raises(RacError, match="gives traces no share, so there is nothing to collect"):
        collect({}, mixture="prompts@1")


def test_collection_continues_until_what_is_selected_fills_the_budget(collect):
    pool = collect({"store": "s.jsonl", "select": {"min_tokens": 12}}, tokens=600)["traces"]
    held = list(TraceStore.read("s.jsonl"))
    fit = [t for t in held if len(t.completion_ids) >= 12]
    assert sum(t.tokens for t in fit) == sum(pool.lengths) >= 600
    assert 0 < len(fit) < len(held)
    assert pool.selection.as_dict() == {
        "kept": len(fit), "of": len(held), "dropped": {"too short": len(held) - len(fit)},
    }  # fmt: skip


def test_collection_continues_until_the_budget_is_met_as_traces_will_be_cut(collect):
    pool = collect({"store": "s.jsonl"}, tokens=400, max_sequence_tokens=16)["traces"]
    assert pool.usable_tokens() == sum(min(t.tokens, 16) for t in pool.store) >= 400
    assert pool.store.counts.tokens > 400
    assert pool.usable_tokens() < 400 + 16 * 16  # and little more: at most one batch


@pytest.mark.parametrize(
    ("sampled", "repeated", "kept_out", "usable", "expected"),
    [
        (150, 50, 98, 2, 200),  # two thirds are usable: (100 kept out + 33 wanted) / (2 / 3)
        (90, 30, 60, 0, 200),  # nothing is left over yet, and less is kept out than wanted
        (1100, 0, 100, 20, 1750),  # a fiftieth is usable, so 33 need 1,650 of the others
        (1100, 0, 100, 2, 4100),  # at most four times as many others in one round
        (300, 0, 100, 20, 430),
    ],
)
def test_a_store_grows_by_what_is_usable_of_it(sampled, repeated, kept_out, usable, expected):
    pool = SimpleNamespace(
        store=SimpleNamespace(counts=SimpleNamespace(tokens=sampled)),
        repeated_tokens=repeated,
        kept_out_tokens=kept_out,
        usable_tokens=lambda: usable,
    )
    assert trace_budget._store_tokens(pool, 33, 100) == pytest.approx(expected, abs=1)


def test_a_selection_that_keeps_nothing_ends_with_an_error(collect, monkeypatch):
    monkeypatch.setattr(trace_budget, "_ENOUGH_TO_JUDGE", 32)
    with pytest.raises(
        RacError, match=r"traces: traces\.select kept 0 of .* wrong.*loosen the selection"
    ):
        collect({"select": {"answers": "correct"}}, tokens=300)


def test_problems_that_end_before_a_selection_is_met_say_so(collect):
    with pytest.raises(
        RacError, match=r"used up.* traces\.select kept 0 of \d+: \d+ wrong, 0 tokens of 300"
    ):
        collect(
            {"select": {"answers": "correct"}, "problems": {"source": "arithmetic", "limit": 20}},
            tokens=300,
        )
