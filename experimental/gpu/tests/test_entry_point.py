"""rac_modifier takes this backend by its entry point."""

from __future__ import annotations

import importlib
import inspect
import tomllib
from pathlib import Path

import rac_gpu
import torch

from rac_modifier.kernels import choose
from rac_modifier.kernels.interface import Backend, Layer

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_entry_point_names_the_backend():
    points = tomllib.loads(PROJECT.read_text())["project"]["entry-points"][choose.GROUP]
    assert importlib.import_module(points["cuda"]) is rac_gpu


def test_the_functions_have_the_parameters_of_the_protocol():
    for name in ("can_run", "pack", "linear"):
        expected = list(inspect.signature(getattr(Backend, name)).parameters)[1:]
        assert list(inspect.signature(getattr(rac_gpu, name)).parameters) == expected


def test_rac_modifier_asks_it_about_a_layer_on_a_gpu(gpu, monkeypatch):
    monkeypatch.setitem(choose.BACKENDS, "cuda", rac_gpu)
    layer = Layer(64, 128, 0.5, torch.bfloat16, torch.bfloat16, 128, two_of_four=True)
    decision, backend = choose.choose(layer, "cuda")
    assert decision.kernel == "sparse GPU kernel 2:4"
    assert backend is rac_gpu
