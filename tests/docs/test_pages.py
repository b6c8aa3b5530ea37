"""What README and docs/ tell a reader to write or type exists: recipes, settings, commands, links,
figures."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from rac_modifier.cli import app
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.grid import Grid, plan_rows
from rac_modifier.settings.recipe import CheckedRecipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECIPES = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = typer.main.get_command(app)
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def blocks(page: Path, language: str = "") -> list[str]:
    """The code blocks of a page, in a language or without one."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> Iterator[str]:
    """Lines that begin with a program's name: of shell blocks, and of code within the text."""
    for block in [*blocks(page, "bash"), *blocks(page)]:
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition(" #")[0].strip()
    in_text = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())
    yield from (" ".join(code.split()) for code in in_text)


@each_page
def test_python_compiles(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_yaml_holds_settings_that_exist(page):
    """A whole recipe, a grid of recipes, or settings of a pruning entry."""
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if "rows" in content:
            assert plan_rows(Grid.model_validate(content), page.name)
            continue
        if any(str(key).endswith("_stage") for key in content):
            name, entry = CheckedRecipe(content, page.name).entry
        else:
            name = "ReasoningAwareSparseGPTModifier"
            entry = content.get(name, content)
            entry = {"sparsity": 0.5, **entry} if entry.get("solver") != "keep" else entry
        ENTRIES[name].model_validate(entry)


@each_page
def test_named_recipes_exist(page):
    kinds = r"\brac_(?:2of4|unstructured|gptq|awq|fp8|w\d|reap|kv|nvfp4)\w*"
    named = set(re.findall(kinds, page.read_text()))
    assert named <= RECIPES


@each_page
def test_commands_and_their_options_exist(page):
    unknown = [f"{line}: {wrong}" for line in command_lines(page) if (wrong := what_is_wrong(line))]
    assert unknown == []


def what_is_wrong(line: str) -> str | None:
    """Of a line `rac COMMAND ... --option`: a command or an option that rac does not have; None for
    any other line."""
    words = re.match(r"(?:\S*/)?rac (.*)", line)
    if words is None:
        return None
    command, rest = COMMANDS, shlex.split(words[1].partition("|")[0])
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            return None  # `rac --help`
        if rest[0] not in command.commands:
            return f"no command {rest[0]!r}"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {"--help"}
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    for word in rest:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"no option {word}"
    return None


def test_a_wrong_command_and_a_wrong_option_are_found():
    assert what_is_wrong("rac prune MODEL OUT --recipe r.yaml") is None
    assert what_is_wrong("rac traces collect MODEL --recipe r.yaml --set a=1") is None
    assert what_is_wrong("rac prone MODEL") == "no command 'prone'"
    assert what_is_wrong("rac traces colect") == "no command 'colect'"
    assert what_is_wrong("rac inspect OUT --colour") == "no option --colour"


@each_page
def test_linked_files_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@each_page
def test_programs_that_a_page_names_exist(page):
    """Files of bench/, examples/, tests/, scripts/ and training/."""
    named = re.findall(r"\b(?:bench|examples|scripts|tests|training)/[\w/.-]*\w", page.read_text())
    assert {name for name in named if not (ROOT / name).exists()} == set()


# Counted or rounded here, not measured: bytes per weight, and sizes.
COUNTED = {"README.md": {"3.4"}, "choosing.md": {"3.4"}}


@pytest.mark.parametrize("name", COUNTED)
def test_figures_are_those_of_the_results(name):
    """docs/results or docs/stopping.md has each number with a decimal point."""
    page = next(page for page in PAGES if page.name == name)
    names = r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+|Apache-2.0|Python 3\.\d+|Qwen2?-[\d.]+B|[-\d.]+B\b"
    text = re.sub(names, "", page.read_text())
    figures = set(re.findall(r"\d+\.\d+", text)) - COUNTED[name]
    pages = [*(ROOT / "docs" / "results").glob("*.md"), ROOT / "docs" / "stopping.md"]
    results = " ".join(path.read_text() for path in pages)
    assert len(figures) >= 5
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", results), figure
