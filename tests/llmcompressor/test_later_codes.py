"""Quantization-aware distillation in a recipe: what GPTQ has rounded is trained through its codes, and saved as measured."""

import json

import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

from rac_modifier import RacError, load_model
from rac_modifier.llmcompressor.later_codes import LaterCodes
from tests.llmcompressor.modifier_helpers import gptq_w4, int4
from tests.llmcompressor.quantized_helpers import decoded, grouped
from tests.tiny import linears, tiny_model

RECOVER = {
    "tokens": 4000,
    "passes": 3,
    "held_out_tokens": 600,
    "step_tokens": 200,
    "batch_tokens": 400,
    "learning_rate": 3e-4,
}


def gptq(bits: int, **changes) -> GPTQModifier:
    groups = {"group_0": {"targets": ["Linear"], **grouped(bits, **changes)}}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_file_holds_the_codes_that_were_trained_and_the_divergence_falls(
    calibrate, tmp_path, monkeypatch, symmetric
):
    monkeypatch.chdir(tmp_path)
    calibrate(later=[gptq(3, symmetric=symmetric)], output_dir=tmp_path / "without")
    model = calibrate(
        later=[gptq(3, symmetric=symmetric)], output_dir=tmp_path / "out", recover=RECOVER
    )
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["recovery"]["kl_after"] < 0.97 * record["recovery"]["kl_before"]
    assert record["method"] == "GPTQModifier"
    before, after = decoded(tmp_path / "without", 3), decoded(tmp_path / "out", 3)
    assert before.keys() == after.keys() == linears(model).keys()
    assert sum(int((codes != before[name][0]).sum()) for name, (codes, _) in after.items()) > 0
    assert all(codes.abs().max() <= (4 if symmetric else 7) for codes, _ in after.values())
    # recovery was measured last on these weights: the file, decoded by itself, gives the same predictions
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    loaded = load_model(tmp_path / "out", dtype="float32")
    plain = tiny_model()
    state = loaded.state_dict()
    plain.load_state_dict(
        {name: state.get(name, value) for name, value in plain.state_dict().items()}
    )
    for name, module in linears(plain).items():
        module.weight.data = after[name][1]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert not any((tmp_path / "rac_recovery").glob("*"))


def test_training_starts_at_the_codes_of_gptq_and_on_the_side_of_the_dense_weight(calibrate):
    model = tiny_model()
    dense = {name: module.weight.detach().clone() for name, module in linears(model).items()}
    codes = LaterCodes([gptq_w4()], model)
    for module in linears(model).values():  # rounded to the nearest by hand: groups of 32, -8 to 7
        groups = module.weight.detach().reshape(len(module.weight), -1, 32)
        scale = groups.abs().amax(2) / 7.5
        module.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
        rounded = (groups / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
        module.weight.data = rounded.reshape(module.weight.shape)
    found = codes.quantized()
    assert found.keys() == dense.keys()
    for name, module in linears(model).items():
        master, step = found[name].master, module.weight_scale.repeat_interleave(32, dim=1)
        assert bool(((master / step).round() == (module.weight / step).round()).all())
        assert bool(
            ((master - dense[name]).abs() <= (module.weight - dense[name]).abs() + 1e-6).all()
        )
        inside = (dense[name] / step - (module.weight / step).round()).abs() < 0.4
        torch.testing.assert_close(master[inside], dense[name][inside], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        (
            [SmoothQuantModifier(), gptq_w4()],
            "recover beside SmoothQuantModifier: it trains what GPTQModifier",
        ),
        (
            [GPTQModifier(**int4())],
            "lm_head is to be quantized; .* add lm_head to ignore of GPTQModifier",
        ),
        ([gptq(8, symmetric=False)], "asymmetric.*cannot be trained through their codes"),
        (
            [QuantizationModifier(targets=["re:nothing"], ignore=[], scheme="FP8_DYNAMIC")],
            "quantize no weight that could be trained",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_sampled(modifiers, message):
    with pytest.raises(RacError, match=message):
        LaterCodes(modifiers, tiny_model())


def test_a_recipe_is_refused_before_sampling(calibrate, tmp_path):
    missing = tmp_path / "new.jsonl"
    with pytest.raises(RacError, match="cannot be trained through their codes"):
        calibrate(later=[gptq(8, symmetric=False)], recover=RECOVER, traces={"store": str(missing)})
    assert not missing.exists()
