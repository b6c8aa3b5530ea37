"""What the sdist and the wheel hold. The wheel is built from the sdist, and here without a
compiler, which is quick.

`make test-dist` installs both in environments of their own.
"""

import configparser
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rac_modifier.kernels.cpu.library import Library

ROOT = Path(__file__).parents[2]
NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}


def build(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """Call one hook of the build backend, as pip does."""
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(out)!r})"
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy, since building writes into the source tree."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("rac_modifier", "recipes", "csrc", "tests"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    return build("sdist", clone, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist's source tree."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # since 3.11.4
        archive.extractall(folder, **filters)
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="session")
def wheel(unpacked, tmp_path_factory) -> Path:
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"), **NO_COMPILER)


@pytest.fixture(scope="session")
def names(wheel) -> set[str]:
    """The files of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel's files in a folder with a space in its name; not to be written to."""
    folder = tmp_path_factory.mktemp("site packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def metadata(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def files_of(folder: Path) -> set[str]:
    """The files of the package in a source tree that are not built."""
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(p.relative_to(ROOT)) for p in paths if p.is_file() and p.suffix != ".so"}


def test_the_wheel_holds_every_file_of_the_package(names):
    package = files_of(ROOT / "rac_modifier")
    package |= {f"rac_modifier/{name}" for name in files_of(ROOT / "recipes")}
    assert {name for name in names if ".dist-info/" not in name} == package


def test_the_sdist_holds_what_the_wheel_is_built_from_and_no_more(unpacked):
    actual = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    sources = files_of(ROOT / "csrc")
    assert len(sources) > 15
    files = {"LICENSE", "README.md", "setup.py", "pyproject.toml"}
    assert sources | files_of(ROOT / "rac_modifier") | files <= actual
    assert not [name for name in actual if name.endswith((".so", ".o", ".pyc"))]
    assert not [name for name in actual if name.startswith("tests/")]


def test_entry_points_and_what_is_always_installed(wheel):
    parsed = configparser.ConfigParser()
    parsed.read_string(metadata(wheel, "entry_points.txt"))
    assert dict(parsed["console_scripts"]) == {"rac": "rac_modifier.cli:main"}
    plugin = {"rac_modifier": "rac_modifier.vllm_plugin.register:register"}
    assert dict(parsed["vllm.general_plugins"]) == plugin
    head = email.message_from_string(metadata(wheel, "METADATA"))
    always = [line for line in head.get_all("Requires-Dist") if "extra ==" not in line]
    assert always
    assert not [line for line in always if line.startswith(("llmcompressor", "vllm"))]


def test_without_a_compiler_the_wheel_is_for_any_machine(wheel, installed, tmp_path):
    """What such an installation says of its kernels: tests/kernels/cpu/test_support.py."""
    assert wheel.name.endswith("-py3-none-any.whl")
    code = "from rac_modifier.kernels.cpu.support import support; print(support().isa)"
    assert run(installed, tmp_path, "-c", code).stdout == "None\n"


def run(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the wheel's package and none of the clone's."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_recipes_and_the_reasoner_are_found_away_from_the_clone(installed, tmp_path):
    code = "import rac_modifier as r; print(r.__file__, r.recipe('rac_2of4'), r.reasoner_path(), "
    paths = run(installed, tmp_path, "-c", rf"{code}sep='\n')").stdout.splitlines()
    assert len(paths) == 3
    assert all(Path(path).is_relative_to(installed) and Path(path).exists() for path in paths)
    listed = run(installed, tmp_path, "-m", "rac_modifier.cli", "recipes").stdout
    names = {line.strip() for line in listed.splitlines() if line.startswith("  rac_")}
    assert names == {path.stem for path in (ROOT / "recipes").iterdir()}
    words = "-m rac_modifier.cli recipes check rac_2of4 rac_gptq_w4a16"
    checked = run(installed, tmp_path, *words.split())
    assert (checked.returncode, checked.stdout.count("valid")) == (0, 2)
    assert list(tmp_path.iterdir()) == []


def test_with_a_compiler_the_wheel_holds_kernels_that_load_for_each_python(unpacked, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    source = shutil.copytree(unpacked, tmp_path / "source")
    for path in (source / "csrc" / "isa").glob("*.cpp"):
        if path.stem != "portable":  # the portable kernel alone compiles in seconds
            path.unlink()
    wheel = build("wheel", source, tmp_path / "wheel")
    assert "-cp311-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        built = archive.extract("rac_modifier/kernels/cpu/_native_kernels.abi3.so", tmp_path)
    assert Library(Path(built)).runs == ("portable",)
