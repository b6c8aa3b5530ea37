"""Codes that recovery trains: of a checkpoint, and of other modifiers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from safetensors.torch import load_file

from rac_modifier import load_model
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.recovery_stage import _mask
from rac_modifier.llmcompressor.trained_codes import (
    LaterCodes,
    QuantizedCheckpoint,
    check_layers,
    check_trainable,
    quantized_names,
)
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.on_grid import on_grid
from rac_modifier.recovery.trained_parameters import in_float32
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.llmcompressor.modifier_helpers import gptq_w4, int4
from tests.llmcompressor.quantized_helpers import CHANNEL, SCHEMES, TOKEN, decoded, grouped, saved
from tests.recovery.recovery_helpers import LiveTeacher, kl_of, sequences
from tests.tiny import linears, tiny_model

HELD_OUT = sequences(20, seed=2)


def recovered(folder: Path, monkeypatch: pytest.MonkeyPatch, rate: float) -> Any:
    """Load, train, encode and save beside; the result, the checkpoint, and the float32 weights of every check."""
    dense, model = tiny_model().to(torch.bfloat16), load_model(folder, dtype="auto")
    check_layers(model, quantized_names(load_file(folder / "model.safetensors")))
    checkpoint = QuantizedCheckpoint(model, dense, ())
    checked = []
    check = TrainingLoop.check

    def watched(self: Any, done: Any) -> float:
        checked.append(
            {name: module.weight.detach().clone() for name, module in linears(self.model).items()}
        )
        return check(self, done)

    monkeypatch.setattr(TrainingLoop, "check", watched)
    modules = dict(model.named_modules())
    result = recover(
        model,
        LiveTeacher(dense),
        sequences(80, seed=1),
        HELD_OUT,
        RecoverySettings(learning_rate=rate, step_tokens=200, batch_tokens=400),
        masks={
            f"{name}.weight": _mask(modules[name], checkpoint.quantized[name])
            for name in checkpoint.pruned
        },
        quantized=checkpoint.quantized,
        progress=False,
    )
    checkpoint.encode()
    model.save_pretrained(folder.parent / "out")
    return result, checkpoint, checked


@pytest.mark.parametrize(
    ("scheme", "pruned", "rate"),
    [
        ("int4", True, 3e-3),
        ("int8", True, 3e-3),
        ("fp8", True, 3e-3),
        ("int4", False, 5e-4),
        ("int3", False, 1.5e-3),
        ("asymmetric int4", False, 5e-4),
        ("asymmetric int4", True, 3e-3),
        ("asymmetric int2", False, 3e-3),
    ],
)
def test_divergence_falls_zeros_stay_and_the_file_holds_what_was_measured(
    tmp_path, monkeypatch, scheme, pruned, rate
):
    folder = saved(tmp_path / "in", SCHEMES[scheme], pruned=pruned)
    result, checkpoint, checked = recovered(folder, monkeypatch, rate)
    assert result.kl_after < 0.97 * result.kl_before
    assert checkpoint.pruned == (set(checkpoint.quantized) if pruned else set())
    bits = int(scheme[-1])
    before, after = decoded(folder, bits), decoded(tmp_path / "out", bits)
    best = checked[[kl for _, kl in result.curve].index(result.kl_after)]
    assert before.keys() == after.keys() == best.keys()
    moved = opened = 0
    for name, (codes, weight) in after.items():
        assert torch.equal(weight, best[name]), name  # float32, bit for bit
        assert torch.equal(before[name][1], checked[0][name]), (
            name
        )  # what is measured first is what was stored
        zero = before[name][0] == 0
        opened += int((codes[zero] != 0).sum())
        moved += int((codes != before[name][0]).sum())
    assert moved > 0
    assert opened == 0 if pruned else opened > 0
    asymmetric = scheme.startswith("asymmetric")
    assert checkpoint.packs is (not asymmetric or not pruned)
    assert all(
        (q.zero is not None and bool(q.zero.any())) == asymmetric
        for q in checkpoint.quantized.values()
    )
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (
        quantization["config_groups"]
        == json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    )
    again = load_model(tmp_path / "out", dtype="auto")
    if scheme.startswith("int4"):  # without activations that are quantized on the way
        assert kl_of(tiny_model().to(torch.bfloat16), again, HELD_OUT) == pytest.approx(
            result.kl_after, rel=0.1
        )


def test_a_module_that_is_recorded_as_pruned_keeps_its_zeros(tmp_path):
    folder = saved(tmp_path / "in", SCHEMES["int4"], pruned=False)
    model, name = load_model(folder, dtype="auto"), "model.layers.1.mlp.up_proj"
    checkpoint = QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), {name: "unstructured"})
    assert checkpoint.pruned == {name}
    zero = decoded(folder, 4)[name][0] == 0
    assert bool(zero.any())
    assert torch.equal(checkpoint.quantized[name].master == 0, zero)
    other = checkpoint.quantized["model.layers.0.mlp.up_proj"].master
    assert bool((other[decoded(folder, 4)["model.layers.0.mlp.up_proj"][0] == 0] != 0).any())


def test_codes_that_are_not_trained_are_written_back_bit_for_bit(tmp_path):
    folder = saved(tmp_path / "in", SCHEMES["int4"], pruned=True)
    model = load_model(folder, dtype="auto")
    checkpoint = QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), ())
    checkpoint.encode()
    model.save_pretrained(tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_training_cannot_keep_is_refused(tmp_path, wrong):
    model = load_model(saved(tmp_path / "in", SCHEMES["int4"], pruned=False), dtype="auto")
    model.model.layers[0].mlp.up_proj.weight_scale.data[3, 1] = wrong
    with pytest.raises(
        RacError, match=r"up_proj\.weight_scale: 1 scales are not finite, or smaller than 1\.2e-38"
    ):
        QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), ())


def test_negative_scales_are_trained_and_stay_negative(tmp_path):
    """As AutoRound writes them: half of the groups, with the codes negated, so that weights stay."""
    model = load_model(saved(tmp_path / "in", SCHEMES["int4"], pruned=False), dtype="auto")
    scales = model.model.layers[0].mlp.up_proj.weight_scale.data
    scales[::2] *= -1
    start = scales.float()  # `on_grid` writes the trained scales back
    checkpoint = QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), ())
    quantized = checkpoint.quantized["model.layers.0.mlp.up_proj"]
    assert torch.equal(quantized.scale.float(), start)
    with in_float32(model), on_grid(model, {"model.layers.0.mlp.up_proj": quantized}):
        form = model.model.layers[0].mlp.up_proj.parametrizations.weight[0]
        form.log_change.data.fill_(0.1)
        changed = form.scale()
    assert torch.equal(changed < 0, start < 0)
    torch.testing.assert_close(changed, start * 1.10517, rtol=1e-2, atol=0.0)


def test_a_group_of_zeros_may_have_any_scale(tmp_path):
    model = load_model(saved(tmp_path / "in", SCHEMES["int4"], pruned=False), dtype="auto")
    module = model.model.layers[0].mlp.up_proj
    module.weight_packed.data[3, :4] = int("88888888", 16) - 2**32  # codes 0
    module.weight_scale.data[3, 0] = 0.0
    checkpoint = QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), ())
    assert bool((module.weight[3, :32] == 0).all())
    assert float(checkpoint.quantized["model.layers.0.mlp.up_proj"].scale[3, 0]) == 1.0


def test_zero_points_that_are_not_one_per_scale_are_refused(tmp_path):
    model = load_model(
        saved(tmp_path / "in", SCHEMES["asymmetric int4"], pruned=False), dtype="auto"
    )
    module = model.model.layers[0].mlp.up_proj
    module.weight_zero_point = torch.nn.Parameter(
        module.weight_zero_point.data[:, :1].clone(), requires_grad=False
    )
    with pytest.raises(
        RacError, match=r"up_proj\.weight_zero_point: shape .* does not fit scales .*; restore it"
    ):
        QuantizedCheckpoint(model, tiny_model().to(torch.bfloat16), ())


def test_a_quantized_head_is_refused(tmp_path):
    model = load_model(
        saved(tmp_path / "in", SCHEMES["int4"], pruned=False, ignore=()), dtype="auto"
    )
    with pytest.raises(RacError, match=r"lm_head is quantized; .*add lm_head to ignore"):
        check_layers(model, set())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"weights": {**CHANNEL, "symmetric": False}},
            "int of 8 bits, strategy channel, asymmetric cannot be trained through",
        ),
        (
            {"weights": {**CHANNEL, "strategy": "tensor"}, "input_activations": TOKEN},
            "strategy tensor cannot be trained",
        ),
    ],
)
def test_grids_that_are_not_trained_are_refused(tmp_path, scheme, message):
    model = load_model(saved(tmp_path / "in", scheme, pruned=False), dtype="auto")
    with pytest.raises(RacError, match=message):
        check_layers(model, set())


def test_modules_that_are_merged_on_loading_are_refused(tmp_path):
    model = load_model(saved(tmp_path / "in", SCHEMES["int4"], pruned=False), dtype="auto")
    stored = {*linears(model), "model.layers.0.mlp.experts.0.up_proj"}
    with pytest.raises(
        RacError, match=r"experts\.0\.up_proj \(1 modules in all\) is quantized and no linear layer"
    ):
        check_layers(model, stored)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("weight_g_idx", "activation order"),
        ("weight_global_scale", "a second scale"),
    ],
)
def test_layouts_that_are_not_trained_are_refused_by_their_names(part, reason):
    names = ["model.norm.weight", "a.b.weight_packed", f"a.b.{part}"]
    with pytest.raises(
        RacError,
        match=rf"folder: a\.b has a {part}: .*{reason}|folder: a\.b has a {part}: {reason}",
    ):
        check_trainable(names, "folder")
    check_trainable(names[:2], "folder")
    assert quantized_names(dict.fromkeys(names)) == {"a.b"}


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
