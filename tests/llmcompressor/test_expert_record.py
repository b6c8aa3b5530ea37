"""What is said about the tokens of experts, and which settings about them are refused."""

from types import SimpleNamespace

import pytest
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from transformers import AutoModelForCausalLM

from rac_modifier import RacError
from rac_modifier.llmcompressor.expert_record import ExpertRecord
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.entries import PruningEntry
from tests.tiny import entry, linears, save_tiny_experts, tiny_model

LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return linearize_moe(
        AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path_factory.mktemp("moe")))
    )


@pytest.fixture
def said():
    lines = []
    handler = logger.add(
        lambda message: lines.append(str(message)), level="INFO", format="{level} {message}"
    )
    yield lines
    logger.remove(handler)


def record(model, **settings) -> ExpertRecord:
    return ExpertRecord(
        PruningEntry(**entry(**settings)), model, {m: n for n, m in linears(model).items()}
    )


def test_starved_experts_are_named(mixture, said):
    made = record(mixture, expert_floor=100)
    routed = [400, 30, 100, 0, 250, 9, 8, 7, 6, 5]
    made.use_order("group", "order: auto")
    made.add(
        LAYER, {f"{LAYER}.{i}": ExpertTokens(n, max(100 - n, 0)) for i, n in enumerate(routed)}
    )
    found = made.record()["experts"]
    assert (found["calibrated on"], found["floor"]) == ("routed", 100)
    layer = found["layers"][LAYER]
    assert layer["routed"] == {"least": 0, "median": 8.5, "most": 400}
    assert layer["starved"] == {
        f"{LAYER}.{i}": {"routed": routed[i], "added": 100 - routed[i]}
        for i in (1, 3, 5, 6, 7, 8, 9)
    }
    (line,) = [line for line in said if line.startswith("WARNING")]
    assert "expert_floor (100)" in line
    assert "experts 1 (30), 3 (0), 5 (9), 6 (8), 7 (7) and 2 more" in line


def test_tokens_that_were_added_without_asking_the_router_are_said_to_be_so(mixture, said):
    made = record(mixture)
    made.add(
        LAYER, {f"{LAYER}.0": ExpertTokens(1, 511, evenly=True), f"{LAYER}.1": ExpertTokens(900, 0)}
    )
    starved = made.record()["experts"]["layers"][LAYER]["starved"]
    assert starved == {f"{LAYER}.0": {"routed": 1, "added": 511, "evenly": True}}
    assert any("evenly spread since its router is not known" in line for line in said)


def test_nothing_is_warned_of_where_all_have_enough(mixture, said):
    made = record(mixture)
    made.add(LAYER, {f"{LAYER}.{i}": ExpertTokens(900 + i, 0) for i in range(4)})
    assert made.record()["experts"]["layers"][LAYER]["starved"] == {}
    assert [line for line in said if line.startswith("WARNING")] == []
    assert any("900 to 903 tokens are routed to each of 4 experts" in line for line in said)


def test_layer_by_layer_says_that_all_tokens_are_used(mixture, said):
    made = record(mixture, reconstruct="pruned")
    made.use_order("layer", "tracing failed: x")
    assert made.record() == {
        "experts": {
            "calibrated on": "all",
            "why": "layer by layer (tracing failed: x)",
            "layers": {},
        }
    }
    assert any(line.startswith("WARNING experts: routed needs the model cut") for line in said)


def test_asked_for_layer_by_layer_it_is_no_warning(mixture, said):
    made = record(mixture, preset="paper")
    made.use_order("layer", "order: layer")
    assert made.record()["experts"]["calibrated on"] == "all"
    assert [line for line in said if line.startswith("WARNING")] == []


@pytest.mark.parametrize(("name", "value"), [("experts", "all"), ("expert_floor", 64)])
def test_what_a_model_without_experts_does_not_use_is_refused(mixture, name, value):
    with pytest.raises(
        RacError, match=rf"{name}: .*{value}.* has no effect here: no routed expert .* leave it out"
    ):
        record(tiny_model(), **{name: value}).check(None)
    record(mixture, **{name: value}).check(None)
    record(tiny_model()).check(None)
    assert record(tiny_model()).record() == {}


def test_defaults_that_a_dumped_recipe_spells_out_are_no_error():
    made = PruningEntry(**PruningEntry(**entry()).model_dump(mode="json"))
    model = tiny_model()
    ExpertRecord(made, model, {m: n for n, m in linears(model).items()}).check(None)


def test_upstreams_switch_against_all_experts(mixture):
    off = SimpleNamespace(dataset_args=SimpleNamespace(moe_calibrate_all_experts=False))
    with pytest.raises(RacError, match="experts: all; leave one of them out"):
        record(mixture, experts="all").check(off)
    record(mixture).check(off)
    on = SimpleNamespace(dataset_args=SimpleNamespace(moe_calibrate_all_experts=True))
    record(mixture, experts="all").check(on)
