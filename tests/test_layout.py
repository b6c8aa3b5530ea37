"""Where tests are, and how long files may be."""

from pathlib import Path

from tests.conftest import SERVING_TESTS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "rac_modifier"
LONGEST = 360  # lines
# Modules without a test file of their own, and why. An __init__.py without a function or a
# class needs no entry.
NO_MIRROR = {
    "__init__.py": "the public names and what importing them costs: tests/test_imports.py",
    "__main__.py": "runs another tool: tests/evaluation/test_lm_eval.py",
    "cli/__main__.py": "calls rac_modifier.cli:main, which tests/cli runs as a process",
    "errors.py": "the class RacError alone; every test of a message raises it",
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def mirror(module: Path) -> Path:
    """kernels/cpu/linear.py -> kernels/cpu/test_linear.py."""
    name = module.parent.name if module.name == "__init__.py" else module.stem
    return module.with_name(f"test_{name}.py")


def defines_something(module: Path) -> bool:
    """Whether a file has a function or a class."""
    return any(
        line.lstrip().startswith(("def ", "async def ", "class "))
        for line in module.read_text().splitlines()
    )


def test_every_module_has_a_mirrored_test_file():
    wanted = [
        module
        for module in MODULES
        if module.as_posix() not in NO_MIRROR
        and (module.name != "__init__.py" or defines_something(PACKAGE / module))
    ]
    assert len(wanted) > 80
    missing = [
        f"{module}: tests/{mirror(module)} is missing"
        for module in wanted
        if not (TESTS / mirror(module)).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_no_file_of_the_package_is_too_long():
    lengths = {str(module): len((PACKAGE / module).read_text().splitlines()) for module in MODULES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_folder_of_tests_is_a_package():
    """Otherwise two test files of one name cannot be collected together."""
    folders = {path.parent for path in TESTS.rglob("*.py")}
    assert [
        str(folder.relative_to(TESTS))
        for folder in sorted(folders)
        if not (folder / "__init__.py").is_file()
    ] == []


def test_what_the_serving_environment_runs_exists():
    assert [name for name in SERVING_TESTS if not (TESTS / name).exists()] == []
