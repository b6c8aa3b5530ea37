"""The entry point: light to import, registers once, and never stops a server. What the plugin imports."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from rac_modifier.vllm_plugin import register as plugin


def test_importing_it_is_light():
    code = "import sys, rac_modifier.vllm_plugin.register; print(*{'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


PACKAGE = Path(__file__).parents[2] / "rac_modifier"
FORBIDDEN = ("llmcompressor", "compressed_tensors", "transformers", "datasets", "loguru")


def imports_of(path: Path) -> set[str]:
    """The full names of what a file imports, inside functions too, except for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(name: str) -> set[Path]:
    """The files that are run when a module of ours is imported, or a name from it; without the package's own."""
    parts, files = name.split("."), set()
    for end in range(2, len(parts) + 1):
        base = PACKAGE.parent.joinpath(*parts[:end])
        files |= {
            path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()
        }
    return files


def test_the_plugin_and_all_that_it_imports_need_no_library_of_the_compress_side():
    """From file to file, inside functions too; `import rac_modifier` itself is held by tests/test_imports.py."""
    left = [*(PACKAGE / "vllm_plugin").rglob("*.py"), *(PACKAGE / "kernels").rglob("*.py")]
    seen: set[Path] = set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports_of(path):
            assert name.split(".")[0] not in FORBIDDEN, f"{path}: imports {name}"
            if name.startswith("rac_modifier."):
                left += files_of(name)
    assert len(seen) > 20
    assert PACKAGE / "checkpoint" / "stored_weight.py" in seen


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
