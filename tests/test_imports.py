"""What importing costs, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rac_modifier"
# From the ground up: a room imports itself and rooms on lines above it; rooms of one line
# do not know each other.
FLOORS = [
    ["errors"],
    ["runtime", "reasoner"],
    ["distributed", "settings", "measure"],
    ["problems"],
    ["sampling"],
    ["traces"],
    ["calibration"],
    ["formats"],
    ["pruning"],
    ["quantization"],
    ["checkpoint"],
    ["kernels"],
    ["evaluation", "vllm_plugin"],
    ["recovery", "frontier"],
    ["llmcompressor"],
    ["__init__", "__main__"],
    ["cli"],
]
COMPRESS_ONLY = ("llmcompressor",)  # the room that imports llmcompressor

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


def loaded_by(statement: str, *names: str) -> set[str]:
    code = f"import sys\n{statement}\nprint('', *(set({names!r}) & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.splitlines()[-1].split())  # llm-compressor logs to standard output


def test_the_package_alone_is_light():
    upstream = ("llmcompressor", "vllm", "transformers", "compressed_tensors")
    heavy = (*upstream, "torch", "numpy")
    assert loaded_by("import rac_modifier, rac_modifier.errors", *heavy, "pydantic") == set()
    assert loaded_by("import rac_modifier.cli", *heavy) == set()


def test_settings_recipes_and_the_schema_load_nothing_heavy():
    """They are checked before anything else is loaded."""
    imports = [f"import rac_modifier.{name}" for name in MODULES if name.startswith("settings.")]
    commands = (["schema"], ["recipes", "check", "rac_2of4", "-s", "sparsity=null"])
    calls = [f"app({words!r}, standalone_mode=False)" for words in commands]
    heavy = ("torch", "transformers", "compressed_tensors", "llmcompressor", "numpy", "datasets")
    program = "\n".join([*imports, "from rac_modifier.cli import app", *calls, "print()"])
    assert loaded_by(program, *heavy) == set()


def test_no_module_but_the_compressing_ones_imports_llmcompressor_and_none_vllm():
    others = [m for m in MODULES if m.split(".")[0] not in COMPRESS_ONLY and m != "__init__"]
    # vllm_plugin imports vllm, and frontier.page imports frontier.charts when it draws
    others = [m for m in others if not m.startswith(("vllm_plugin", "frontier.charts"))]
    assert len(others) > 20
    imports = "\n".join(f"import rac_modifier.{module}" for module in others)
    heavy = ("llmcompressor", "vllm", "datasets", "reasoning_gym", "altair", "math_verify")
    assert loaded_by(imports, *heavy) == set()


def test_what_serving_needs_imports_no_transformers():
    """In a serving process each module is imported again and again by workers."""
    statement = (
        "import rac_modifier.formats.bitmask, rac_modifier.checkpoint.inspect, "
        "rac_modifier.pruning.solve, rac_modifier.kernels.choose"
    )
    heavy = ("transformers", "llmcompressor", "vllm", "compressed_tensors")
    assert loaded_by(statement, *heavy) == set()


def imported(path: Path, prefix: str = "rac_modifier.") -> list[tuple[str, int]]:
    """What a file imports from this package, also inside functions, with its line."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        ours = [name for name in names if f"{name}.".startswith(prefix)]
        imports += [(name.removeprefix(prefix), node.lineno) for name in ours]
    return imports


def room(path: Path) -> str:
    """The folder of a module, or the name of a module that has none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_run_one_way():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        assert room(path) in floor, f"{path.relative_to(PACKAGE)}: a new room; write its floor down"
        for name, line in imported(path):
            top = name.split(".")[0]
            if top != room(path) and floor.get(top, floor["__init__"]) >= floor[room(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert wrong == []


def imports_by_module() -> dict[str, set[str]]:
    modules = {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")
    }
    return {
        name: {m for n, _ in imported(path) for m in modules if f"{n}.".startswith(f"{m}.")}
        for name, path in modules.items()
    }


def test_measuring_and_training_need_few_modules():
    """They read token ids, and know no trace, problem or calibration set."""
    edges = imports_by_module()
    from_traces = {"recovery.stage", "recovery.checkpoint"}  # they take sequences from traces
    starts = {name for name in edges if name.startswith(("measure.", "recovery."))}
    for start in starts - from_traces:
        reached, remaining = set(), [start]
        while remaining:
            fresh = edges[remaining.pop()] - reached
            reached |= fresh
            remaining += fresh
        assert len(reached) <= 22, f"{start} imports {sorted(reached)}"


def test_no_modules_import_each_other_in_a_circle():
    """Inside functions too."""
    edges = imports_by_module()
    while ends := [name for name, targets in edges.items() if not targets - {name}]:
        for name in ends:
            del edges[name]
        for targets in edges.values():
            targets.difference_update(ends)
    assert not edges, f"modules that import each other in a circle, or such: {sorted(edges)}"


def test_llmcompressor_and_vllm_are_imported_where_they_may_be():
    """Inside functions too."""
    for path in PACKAGE.rglob("*.py"):
        if room(path) not in ("llmcompressor", "cli"):
            assert imported(path, "llmcompressor.") == [], path
        if room(path) != "vllm_plugin":
            assert imported(path, "vllm.") == [], path


def test_public_names_are_there():
    import rac_modifier

    names = set(rac_modifier.__all__) - {"__version__"}
    assert {getattr(rac_modifier, name).__name__ for name in names} == names
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        rac_modifier.prune  # noqa: B018
