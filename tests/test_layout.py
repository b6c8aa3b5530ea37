"""Where tests are, and how long files may be."""

from pathlib import Path

from tests.conftest import SERVING_TESTS

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "rac_modifier"
LONGEST = 360  # lines
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


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
