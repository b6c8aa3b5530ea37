"""What importing costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rac_modifier"
ORDER = [
    "answers",
    "reasoner",
    "traces",
    "calibration",
    "pruning",
    "quantization",
    "pipelines",
    "checkpoint",
    "serving",
    "evaluation",
]
WIRING = {"modifier", "presets", "recipe", "cli", "_llmcompressor", "__init__"}
FOR_ALL = {"errors"}
COMPRESS_ONLY = ("pipelines", "modifier", "recipe")  # those that import llmcompressor

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


def loaded_by(statement: str, *names: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('', *(set({names!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())  # llm-compressor logs to standard output


def test_the_package_alone_is_light():
    heavy = ("llmcompressor", "vllm", "torch", "transformers", "numpy", "pydantic", "yaml", "compressed_tensors")
    assert loaded_by("import rac_modifier, rac_modifier.errors, rac_modifier.cli", *heavy) <= {"yaml"}


def test_no_module_but_the_compressing_ones_imports_llmcompressor_and_none_vllm():
    others = [m for m in MODULES if m.split(".")[0] not in COMPRESS_ONLY and m != "__init__"]
    others = [m for m in others if not m.startswith("serving.vllm_layers")]  # the one place that imports vllm
    assert len(others) > 20
    imports = "\n".join(f"import rac_modifier.{module}" for module in others)
    heavy = ("llmcompressor", "vllm", "datasets", "reasoning_gym", "matplotlib", "math_verify")
    assert loaded_by(imports, *heavy) == set()


def test_what_serving_needs_imports_no_transformers():
    """In a serving process each module is imported again and again by workers."""
    statement = "import rac_modifier.checkpoint.bitmask, rac_modifier.checkpoint.inspect, rac_modifier.pruning.patterns"
    assert loaded_by(statement, "transformers", "llmcompressor", "vllm", "compressed_tensors") == set()


def imported(path: Path, prefix: str = "rac_modifier.") -> list[tuple[str, int]]:
    """What a file imports from this package, inside functions too, as `folder.module` with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(n.removeprefix(prefix), node.lineno) for n in names if f"{n}.".startswith(prefix)]
    return found


def test_imports_run_one_way():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        folder, *rest = path.relative_to(PACKAGE).parts
        if folder in WIRING:
            continue
        if not rest:
            assert path.stem in WIRING | FOR_ALL, f"{path.name}: a new module at the top; is it wiring?"
            continue
        allowed = ORDER[: ORDER.index(folder) + 1]
        if folder == "evaluation":
            allowed = ORDER
        for name, line in imported(path):
            top = name.split(".")[0]
            if top not in {*allowed, *FOR_ALL, "__version__"}:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert wrong == []


def test_llmcompressor_and_vllm_are_imported_where_they_may_be():
    """Inside functions too."""
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in ("modifier", "pipelines", "cli"):
            assert imported(path, "llmcompressor.") == [], place
        if place.parts[0] != "serving":
            assert imported(path, "vllm.") == [], place


def test_every_folder_has_its_place():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= {*ORDER, *WIRING}


@pytest.mark.parametrize(
    "name",
    [
        "ReasoningAwareSparseGPTModifier",
        "ReasoningAwareCalibrationModifier",
        "load_model",
        "reasoner_path",
        "RacError",
    ],
)
def test_public_names_are_there(name):
    import rac_modifier

    assert name in rac_modifier.__all__
    assert getattr(rac_modifier, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    import rac_modifier

    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        rac_modifier.prune  # noqa: B018
