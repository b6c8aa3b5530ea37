"""The entry point: light to import, registers once, and never stops a server."""

import logging
import subprocess
import sys
from types import ModuleType
from typing import Literal

import pytest

from rac_modifier.vllm_plugin import register as plugin


def test_importing_it_is_light():
    code = (
        "import sys, rac_modifier.vllm_plugin.register; print(*{'torch', 'vllm', 'transformers', "
        "'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.split() == []


def fake_vllm(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> ModuleType:
    """As much of vLLM as `register` looks at."""
    path = "vllm.model_executor.layers.quantization"
    for end in (i for i, letter in enumerate(path + ".") if letter == "."):
        monkeypatch.setitem(sys.modules, path[:end], ModuleType(path[:end]))
    layers = sys.modules["vllm.model_executor.layers"]
    module = sys.modules[path]
    monkeypatch.setattr(layers, "quantization", module, raising=False)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_a_method_of_vllms_own_wins(monkeypatch, caplog):
    def register_quantization_config(name: str) -> None:
        raise AssertionError("replaced vLLM's own method")

    fake_vllm(
        monkeypatch,
        QuantizationMethods=Literal["fp8", "rac"],
        register_quantization_config=register_quantization_config,
    )
    with caplog.at_level(logging.WARNING, logger="vllm"):
        plugin.register()
    assert "the one of rac-modifier is not registered" in caplog.text


def test_another_vllm_is_a_warning(monkeypatch, caplog):
    fake_vllm(monkeypatch)  # without QuantizationMethods
    with caplog.at_level(logging.WARNING, logger="vllm"):
        plugin.register()
    assert "does not fit this vLLM" in caplog.text
    assert "AttributeError" in caplog.text
