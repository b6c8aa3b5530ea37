"""The one place that chooses a backend: built in, from an entry point, or none with the reason."""

import inspect
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import torch

from rac_modifier.formats.encoding import Encoding
from rac_modifier.kernels import choose as choose_module
from rac_modifier.kernels import cpu
from rac_modifier.kernels.choose import BACKENDS, choose
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Backend, Layer
from tests.kernels import fake_backend

PACKAGE = Path(__file__).parents[2] / "rac_modifier"
HALF = Layer(64, 128, 0.5, Encoding("bfloat", 16), torch.bfloat16)


@pytest.mark.parametrize("backend", [*BACKENDS.values(), fake_backend])
@pytest.mark.parametrize("name", ["can_run", "pack", "linear"])
def test_a_backend_has_the_three_functions(backend, name):
    def arguments(function: object) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(backend, name)) == arguments(getattr(Backend, name))[1:]


def test_no_other_place_names_the_folder_of_a_backend():
    """What only CPUs have is imported by name: lookup, batch invariance, 8-bit activations."""
    cpu_only = ("vllm_plugin/vocabulary", "vllm_plugin/config", "evaluation/activations")
    cpu_only = (*cpu_only, "cli/doctor")
    named_in = {PACKAGE / f"{path}.py" for path in ("kernels/choose", *cpu_only)}
    for path in PACKAGE.rglob("*.py"):
        if path not in named_in and path.parent.name not in BACKENDS:
            text = path.read_text()
            assert "kernels.cpu" not in text, path
            assert "from rac_modifier.kernels import cpu" not in text, path


def test_the_cpu_has_a_backend_and_it_decides(monkeypatch):
    monkeypatch.setattr(cpu, "machine_support", lambda: Support("avx2", ""))
    assert choose(HALF, "cpu")[1] is cpu
    monkeypatch.setattr(cpu, "machine_support", lambda: Support(None, "no compiled kernel"))
    decision, chosen = choose(HALF, "cpu")
    assert decision.reason == "dense because no compiled kernel"
    assert chosen is None


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "dense because there is no sparse kernel for xpu"),
        ("tests.kernels.fake_backend", "a fake kernel"),
        (
            "tests.kernels.no_such_module",
            "dense because the backend of tests.kernels.no_such_module cannot be imported"
            " (ModuleNotFoundError: No module",
        ),
    ],
)
def test_an_installed_package_may_bring_a_backend(monkeypatch, module, reason):
    points = EntryPoints([EntryPoint("xpu", module, choose_module.GROUP)] if module else [])
    monkeypatch.setattr(choose_module, "entry_points", lambda **keys: points.select(**keys))
    choose_module._from_entry_point.cache_clear()
    decision, backend = choose(HALF, "xpu")
    choose_module._from_entry_point.cache_clear()
    assert decision.reason.startswith(reason)
    assert backend is (fake_backend if decision.sparse else None)
