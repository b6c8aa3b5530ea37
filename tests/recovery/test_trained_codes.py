"""Codes of a checkpoint that recovery trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rac_modifier import load_model
from rac_modifier.errors import RacError
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.on_grid import on_grid
from rac_modifier.recovery.stage import _mask
from rac_modifier.recovery.student import in_float32
from rac_modifier.recovery.trained_codes import (
    QuantizedCheckpoint,
    check_layers,
    quantized_names,
)
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.settings.recovery import RecoverySettings
from tests.checkpoint.checkpoint_helpers import CHANNEL, TOKEN
from tests.llmcompressor.conftest import quantization_config
from tests.llmcompressor.quantized_helpers import SCHEMES, decoded, saved
from tests.recovery.recovery_helpers import LiveTeacher, kl_of, sequences
from tests.tiny import linears, tiny_model

HELD_OUT = sequences(20, seed=2)
UP = "model.layers.0.mlp.up_proj"


def dense() -> Any:
    return tiny_model().to(torch.bfloat16)


def loaded(tmp_path: Path, scheme: str = "int4", pruned: bool = False, **more: Any) -> Any:
    return load_model(saved(tmp_path / "in", SCHEMES[scheme], pruned=pruned, **more), dtype="auto")


def recovered(folder: Path, monkeypatch: pytest.MonkeyPatch, rate: float) -> Any:
    """Train, encode and save: the result, the checkpoint, and the weights of every check."""
    model = load_model(folder, dtype="auto")
    check_layers(model, quantized_names(load_file(folder / "model.safetensors")))
    checkpoint, checked, check = QuantizedCheckpoint(model, dense(), ()), [], TrainingLoop.check

    def watched(self: Any, process: Any) -> float:
        checked.append({n: m.weight.detach().clone() for n, m in linears(self.model).items()})
        return check(self, process)

    monkeypatch.setattr(TrainingLoop, "check", watched)
    settings = RecoverySettings(learning_rate=rate, step_tokens=200, batch_tokens=400)
    masks, codes = {}, checkpoint.quantized
    for name in checkpoint.pruned:
        masks[f"{name}.weight"] = _mask(model.get_submodule(name), codes[name])
    traces = (sequences(80, seed=1), HELD_OUT)
    options = {"masks": masks, "quantized": codes}
    result = recover(model, LiveTeacher(dense()), *traces, settings, **options)
    checkpoint.encode()
    model.save_pretrained(folder.parent / "out")
    return result, checkpoint, checked


@pytest.mark.parametrize(
    ("scheme", "pruned", "rate"),
    [
        ("int4", True, 3e-3),
        ("int8", True, 3e-3),
        ("fp8", True, 3e-3),
        ("int3", False, 1.5e-3),
        ("asymmetric int4", True, 3e-3),
        ("asymmetric int2", False, 3e-3),
        ("NVFP4", True, 3e-3),
        ("MXFP4", False, 5e-4),
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
        assert torch.equal(before[name][1], checked[0][name]), name  # begins with what was stored
        zero = before[name][0] == 0
        opened += int((codes[zero] != 0).sum())
        moved += int((codes != before[name][0]).sum())
    assert moved > 0
    assert opened == 0 if pruned else opened > 0
    asymmetric, floats = scheme.startswith("asymmetric"), scheme.endswith("FP4")
    assert checkpoint.packs is (not (asymmetric or floats) or not pruned)
    zeros = [q.zero for q in checkpoint.quantized.values()]
    assert all((zero is not None and bool(zero.any())) == asymmetric for zero in zeros)
    files = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "out")]
    for name in (name for name in files[0] if name.endswith("_scale") and floats):
        assert torch.equal(*(tensors[name] for tensors in files)), name  # also of activations
    groups = [quantization_config(path)["config_groups"] for path in (tmp_path / "out", folder)]
    assert groups[0] == groups[1]
    if scheme == "int4":  # without activations that are quantized on the way
        again = kl_of(dense(), load_model(tmp_path / "out", dtype="auto"), HELD_OUT)
        assert again == pytest.approx(result.kl_after, rel=0.1)


def test_a_module_that_is_recorded_as_pruned_keeps_its_zeros(tmp_path):
    name = "model.layers.1.mlp.up_proj"
    checkpoint = QuantizedCheckpoint(loaded(tmp_path), dense(), {name: "unstructured"})
    assert checkpoint.pruned == {name}
    codes = decoded(tmp_path / "in", 4)
    assert bool((codes[name][0] == 0).any())
    assert torch.equal(checkpoint.quantized[name].master == 0, codes[name][0] == 0)
    assert bool((checkpoint.quantized[UP].master[codes[UP][0] == 0] != 0).any())


def test_a_quantized_head_is_dense_in_training_and_written_back_as_it_was(tmp_path):
    model, ids = loaded(tmp_path, ignore=()), torch.tensor([[5, 6, 7, 8, 9]])
    check_layers(model, quantized_names(load_file(tmp_path / "in" / "model.safetensors")))
    checkpoint = QuantizedCheckpoint(model, dense(), ())
    assert checkpoint.quantized.keys() == linears(dense()).keys()
    with torch.no_grad():
        states = model.model(ids).last_hidden_state
        assert torch.equal(model(ids).logits, states @ dense().lm_head.weight.T)
    checkpoint.encode()
    model.save_pretrained(tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert "lm_head.weight_packed" in after
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_negative_scales_are_trained_and_stay_negative(tmp_path):
    """As AutoRound writes them: half of the groups, with the codes negated."""
    model = loaded(tmp_path)
    scales = model.get_submodule(UP).weight_scale.data
    scales[::2] *= -1
    start = scales.float()  # `on_grid` writes the trained scales back
    quantized = QuantizedCheckpoint(model, dense(), ()).quantized[UP]
    assert torch.equal(quantized.scale.float(), start)
    with in_float32(model), on_grid(model, {UP: quantized}):
        form = model.get_submodule(UP).parametrizations.weight[0]
        form.log_change.data.fill_(0.1)
        changed = form.scale()
    assert torch.equal(changed < 0, start < 0)
    torch.testing.assert_close(changed, start * 1.10517, rtol=1e-2, atol=0.0)


def test_a_group_of_zeros_may_have_any_scale(tmp_path):
    model = loaded(tmp_path)
    module = model.get_submodule(UP)
    module.weight_packed.data[3, :4] = int("88888888", 16) - 2**32  # codes 0
    module.weight_scale.data[3, 0] = 0.0
    checkpoint = QuantizedCheckpoint(model, dense(), ())
    assert bool((module.weight[3, :32] == 0).all())
    assert float(checkpoint.quantized[UP].scale[3, 0]) == 1.0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_scale_that_training_cannot_keep_is_refused(tmp_path, wrong):
    model = loaded(tmp_path)
    model.get_submodule(UP).weight_scale.data[3, 1] = wrong
    with pytest.raises(RacError, match=r"up_proj\.weight_scale: 1 scales are not finite, or small"):
        QuantizedCheckpoint(model, dense(), ())


def test_zero_points_that_are_not_one_per_scale_are_refused(tmp_path):
    model = loaded(tmp_path, "asymmetric int4")
    module = model.get_submodule(UP)
    few = module.weight_zero_point.data[:, :1].clone()
    module.weight_zero_point = torch.nn.Parameter(few, requires_grad=False)
    with pytest.raises(RacError, match=r"weight_zero_point: .* fits no scales .*; rest"):
        QuantizedCheckpoint(model, dense(), ())


PER_TENSOR = {"weights": {**CHANNEL, "strategy": "tensor"}, "input_activations": TOKEN}


@pytest.mark.parametrize(
    ("scheme", "stored", "says"),
    [
        (SCHEMES["int4"], ("a.experts.0.up",), "is quantized and no linear layer once"),
        ({"weights": {**CHANNEL, "symmetric": False}}, (), "zero points cannot be trained"),
        (PER_TENSOR, (), "per tensor cannot be trained"),
    ],
)
def test_layers_that_are_not_trained_are_refused(tmp_path, scheme, stored, says):
    model = load_model(saved(tmp_path / "in", scheme, pruned=False), dtype="auto")
    with pytest.raises(RacError, match=says):
        check_layers(model, {*linears(model), *stored})


def test_a_quantized_embedding_is_refused(tmp_path):
    model = loaded(tmp_path)
    model.model.embed_tokens.quantization_scheme = model.get_submodule(UP).quantization_scheme
    with pytest.raises(RacError, match=r"embed_tokens is quantized; .*embed_tokens in ignore"):
        check_layers(model, ())
