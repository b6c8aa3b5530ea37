"""The documentation site: it builds without a warning, and shows every setting and every recipe as
they are."""

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. It takes three seconds."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="not installed; pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def text_of(page: Path) -> str:
    """The words of a page, without its tags."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


def leaves(schema: dict, definitions: dict, path=()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every setting of a JSON Schema with its description, groups included."""
    for name, entry in schema.get("properties", {}).items():
        yield (*path, name), entry["description"]
        for reference in re.findall(r"#/\$defs/(\w+)", json.dumps(entry)):
            yield from leaves(definitions[reference], definitions, (*path, name))


def test_every_setting_is_on_the_page_of_settings(site):
    """Compared with the published JSON Schema, which other code writes."""
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    described = list(leaves(schema, schema["$defs"]))
    assert len({path[-1] for path, _ in described}) > 60
    page = text_of(site / "settings" / "index.html")
    for path, description in described:
        assert f"{path[-1]} " in page, path
        assert " ".join(description.split()) in page, path


def test_the_settings_that_only_pruning_has_are_listed(site):
    page = text_of(site / "settings" / "index.html")
    listed = page[page.index("apart from these:") : page.index("Where to write a setting")]
    both = [
        set(json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())["properties"])
        for name in ("recipe", "calibration")
    ]
    for name in both[0] - both[1]:
        assert re.search(rf"\b{name}\b", listed), name
    for name in both[1]:
        assert not re.search(rf"(?<![.\w]){name}\b(?!\.)", listed), name


def test_every_recipe_is_shown_whole(site):
    page = text_of(site / "recipes" / "index.html")
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert len(recipes) >= 10
    for recipe in recipes:
        for line in recipe.read_text().splitlines():
            assert " ".join(line.removeprefix("#").split()) in page, f"{recipe.name}: {line}"


def test_a_setting_without_a_description_stops_the_build():
    pytest.importorskip("mkdocs", reason="not installed; pip install -e '.[docs]'")
    from pydantic import BaseModel

    from scripts.docs_site import render_settings

    class Mute(BaseModel):
        shout: int = 1

    with pytest.raises(ValueError, match="shout: this setting has no description"):
        list(render_settings(Mute.model_json_schema(), {}, (), {}))
