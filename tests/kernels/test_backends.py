"""What every backend has, and that a new one needs an entry in the one place and nothing else."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.formats import check, pack
from rac_modifier.kernels.choose import BACKENDS, choose
from rac_modifier.kernels.interface import Backend, Layer
from rac_modifier.kernels.plan import plan_checkpoint, render_plan
from tests.checkpoint.test_stored_weight import random_weight
from tests.kernels import fake_backend

PACKAGE = Path(__file__).parents[2] / "rac_modifier"
FUNCTIONS = ("can_run", "pack", "linear")
FORMAT = "sparse-bitmask"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device type of a registered backend."""
    monkeypatch.setitem(BACKENDS, "fake", fake_backend)
    fake_backend.CALLS.clear()
    return "fake"


@pytest.mark.parametrize(
    "backend", [*BACKENDS.values(), fake_backend], ids=lambda module: module.__name__
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_backend_has_the_three_functions(backend, name):
    def arguments(function: object) -> list[tuple[str, object]]:
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.name != "self"
        ]

    assert arguments(getattr(backend, name)) == arguments(getattr(Backend, name))


def test_a_layer_is_served_through_a_registered_backend(fake):
    dense = random_weight(24, 40, 0, True, torch.float32)
    weight = check(pack(dense, FORMAT, "a"), FORMAT, "a")
    decision, backend = choose(Layer.of(weight, torch.float32), fake)
    assert decision.sparse
    assert backend is not None
    packed = backend.pack(weight, torch.float32)
    x, bias = torch.randn(3, 40), torch.randn(24)
    y = backend.linear(x, packed, weight.rows, weight.columns, bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, bias))
    assert fake_backend.CALLS == ["can_run", "pack"]


def test_a_plan_asks_the_registered_backend(fake, tmp_path):
    tensors = pack(random_weight(24, 40, 0, True), FORMAT, "a") | {"shape": torch.tensor([24, 40])}
    save_file(
        {f"a.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    sparsity = {"quant_method": "compressed-tensors", "sparsity_config": {"format": FORMAT}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": sparsity}))
    assert render_plan(plan_checkpoint(tmp_path, device=fake)) == "a (24x40): a fake kernel"


def test_no_other_place_names_the_folder_of_a_backend():
    """Only choose.py imports backends; others use the functions that it returns.

    What only CPUs have is imported by name: looking rows up, the measured crossover, activations in 8 bits.
    """
    of_cpus = [f"vllm_plugin/{name}.py" for name in ("vocabulary", "config")]
    of_cpus.append("evaluation/integer_layers.py")
    named_in = {PACKAGE / path for path in ("kernels/choose.py", *of_cpus)}
    for path in PACKAGE.rglob("*.py"):
        if path in named_in or path.parent.name in BACKENDS:
            continue
        text = path.read_text()
        for device in BACKENDS:
            assert f"kernels.{device}" not in text, path
            assert f"from rac_modifier.kernels import {device}" not in text, path
