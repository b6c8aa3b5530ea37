"""Groups by their shapes, and what is kept beside them."""

from __future__ import annotations

from llmcompressor.modeling.moe.linearize import linearize_moe
from transformers import AutoModelForCausalLM

from rac_modifier.llmcompressor.group_shape import GroupShape
from tests.tiny import linears, save_tiny, save_tiny_experts, tiny_model


def test_a_group_has_the_rows_of_all_its_modules():
    names = {module: name for name, module in linears(tiny_model()).items()}
    attention = [
        module for module, name in names.items() if name.startswith("model.layers.0.self_attn")
    ][:3]
    assert GroupShape.of(names, attention) == GroupShape(
        "model.layers.0.self_attn.q_proj", 64, 64 + 32 + 32
    )


def test_layers_are_counted_apart(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "dense"))
    names = {module: name for name, module in linears(model).items()}
    found = GroupShape.by_layer(model, names)
    assert [one.name.split(".")[2] for one in found] == ["0"] * 3 + ["1"] * 3
    wide = next(one for one in found if one.name.endswith("down_proj"))
    assert wide.beside == 4 * sum(
        one.columns**2 for one in found[:3] if one.columns != wide.columns
    )


def test_group_by_group_the_routed_experts_are_known(tmp_path):
    model = linearize_moe(
        AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path / "mixture"))
    )
    names = {module: name for name, module in linears(model).items() if not name.endswith("gate")}
    found = GroupShape.by_group(model, names, [[module] for module in names])
    assert {one.name: one.routed for one in found} == {
        name: ".experts." in name for name in names.values()
    }
    assert {one.routed for one in found} == {False, True}
    assert [one.after.name for one in found[:-1]] == [one.name for one in found[1:]]
    assert [one.before.name for one in found[1:]] == [one.name for one in found[:-1]]
    assert (found[0].before, found[-1].after) == (None, None)
