"""A mixture of experts: every expert pruned on its own tokens; packed, loaded back, resumed."""

import functools

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

import rac_modifier
from rac_modifier.llmcompressor.run import Run
from tests.llmcompressor.conftest import record_of
from tests.llmcompressor.modifier_helpers import INT8, assert_same_weights, weights
from tests.llmcompressor.test_resume import result
from tests.tiny import EXPERTS, entry, is_2of4, linears, recipe, save_tiny_experts


def run(folder, kind="qwen3", name="out", oneshot_options=None, **settings):
    if not (folder / "dense").exists():
        save_tiny_experts(folder / "dense", kind)
    model = oneshot(
        model=str(folder / "dense"),
        recipe=recipe(entry(folder / "traces.jsonl", **{"solver": "sparsegpt", **settings})),
        output_dir=str(folder / name),
        precision="float32",
        **(oneshot_options or {}),
    )
    return folder / name, model


@pytest.fixture(scope="module")
def pruned_once(tmp_path_factory):
    """The folder of a pruned model of a kind, and the model."""
    return functools.cache(lambda kind: run(tmp_path_factory.mktemp(kind), kind))


@pytest.fixture(scope="module", params=["qwen3", "mixtral", "qwen2"])
def mixture(request, pruned_once):
    return pruned_once(request.param)


@pytest.fixture(scope="module")
def base(pruned_once):
    """A folder with a dense model and its traces, and a pruned model of it."""
    folder, model = pruned_once("qwen3")
    return folder.parent, model


def routers(model):
    ends = (".mlp.gate.weight", "shared_expert_gate.weight")
    return {name: value for name, value in weights(model).items() if name.endswith(ends)}


def test_every_expert_is_pruned_and_the_router_keeps_every_bit(mixture):
    folder, model = mixture
    every = {n: m for n, m in linears(model).items() if not n.endswith("shared_expert_gate")}
    assert sum(".experts." in name for name in every) == 2 * 3 * EXPERTS
    assert [name for name, module in every.items() if not is_2of4(module.weight)] == []
    before = routers(AutoModelForCausalLM.from_pretrained(folder.parent / "dense"))
    assert len(before) >= 2
    assert_same_weights(before, routers(rac_modifier.load_model(folder, dtype="float32")))


def test_the_packed_checkpoint_loads_back_bit_by_bit(mixture):
    folder, model = mixture
    loaded = rac_modifier.load_model(folder, dtype="float32")
    for layer, theirs in zip(model.model.layers, loaded.model.layers, strict=True):
        for number in range(EXPERTS):
            expert = layer.mlp.experts[number]
            gate_up = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            assert torch.equal(gate_up, theirs.mlp.experts.gate_up_proj[number])
            assert torch.equal(expert.down_proj.weight, theirs.mlp.experts.down_proj[number])
    assert_close(loaded, model)


def assert_close(loaded, model):
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():  # grouped and looped experts add in another order
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_record_has_the_tokens_of_each_expert(mixture):
    record = record_of(mixture[0])
    assert record["order"] == {"order": "group", "why": "order: auto", "reconstruct": "dense"}
    said, tokens = record["experts"], {row["name"]: row["tokens"] for row in record["modules"]}
    total = tokens["model.layers.0.self_attn.q_proj"]
    assert said["calibrated on"] == "routed"
    assert sorted(said["layers"]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for name, layer in said["layers"].items():
        own = [tokens[f"{name}.{number}.down_proj"] for number in range(EXPERTS)]
        added = [layer["starved"].get(f"{name}.{e}", {"added": 0})["added"] for e in range(EXPERTS)]
        assert sum(own) - sum(added) == 2 * total, "each token has two experts"
        assert min(own) >= 512
        assert max(own) < total, "no expert got every token"
        assert layer["routed"]["most"] == max(
            n for n, more in zip(own, added, strict=True) if not more
        )
        for number in range(EXPERTS):
            projections = ("gate_proj", "up_proj", "down_proj")
            assert len({tokens[f"{name}.{number}.{part}"] for part in projections}) == 1


def test_quantized_experts_are_pruned_and_rounded(base):
    folder, model = run(base[0], name="rounded", quantization=INT8)
    assert record_of(folder)["order"]["order"] == "group"
    assert_close(rac_modifier.load_model(folder, dtype="float32"), model)


def test_every_expert_gets_all_tokens_layer_by_layer(base):
    folder, _ = run(base[0], name="all", preset="paper")
    record = record_of(folder)
    assert record["experts"] == {"calibrated on": "all", "layers": {}}
    assert len({row["tokens"] for row in record["modules"]}) == 1


def test_a_part_of_the_experts_can_be_left_dense_whatever_upstreams_switch_says(base):
    ignore = ["re:.*experts.2.*", "re:.*layers.1.*down_proj"]
    options = {"moe_calibrate_all_experts": False}
    settings = {"ignore": ignore, "storage": "dense", "oneshot_options": options}
    _, model = run(base[0], name="part", **settings)
    for name, module in linears(model).items():
        dense = ".experts.2." in name or ("layers.1" in name and "down_proj" in name)
        assert is_2of4(module.weight) is not dense, name
        if "layers.0" in name and not dense:
            assert torch.equal(module.weight, base[1].get_submodule(name).weight), name


@pytest.mark.parametrize(("call", "last"), [(4, "layers.0.mlp"), (7, "layers.1.mlp")])
def test_a_run_killed_among_experts_ends_with_the_same_bytes(base, monkeypatch, call, last):
    """Solved in one call, no expert counts until all are there: alone it would have other bits.

    The record has the tokens of each layer's experts, also where all of them are restored.
    """
    original, calls = Run.prune, []

    def killed(self, groups, per_call=None):
        calls.append([self.names[module] for group in groups for module in group.modules])
        if len(calls) == call:
            raise KeyboardInterrupt
        original(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base[0], name=f"killed-{call}")
    assert len(calls[-1]) == EXPERTS * (1 if call == 4 else 2)
    assert all(last in name and ("down_proj" in name) == (call == 4) for name in calls[-1])
    resumed, _ = run(base[0], name=f"killed-{call}")
    assert calls[call] == calls[call - 1], "it goes on with what was not written"
    assert result(resumed) == result(base[0] / "out")
