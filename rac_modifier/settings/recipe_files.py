"""Recipes and other YAML files that a user names: plain data, each key once, of bounded size."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from rac_modifier.errors import RacError, refusing
from rac_modifier.runtime.files import regular_file

# beside the modules in a wheel (setup.py), beside the package in a clone
FOLDER = next(
    folder
    for folder in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")
    if folder.is_dir()
)
_BYTES = 1 << 20
_NODES = 100_000  # with the target of an alias counted at each alias
_INTEGER_BITS = 63


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe(name: str) -> str:
    """Return the path of a shipped recipe (RacError: no such recipe).

    oneshot("path/or/id", recipe=rac_modifier.recipe("rac_2of4"), output_dir="out")
    """
    if name not in recipe_names():
        close = difflib.get_close_matches(Path(name).stem, recipe_names(), n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(close)}? Or " if close else ""
        raise RacError(
            f"no recipe {name!r}; {meant}name a YAML file, or one of the recipes that "
            "`rac recipes` lists"
        )
    return str(FOLDER / f"{name}.yaml")


def find_recipe(named: str | Path) -> Path:
    """Return the user's file, or else the shipped recipe of this name (RacError: neither)."""
    path = Path(named)
    shipped = not path.is_file() and str(named) in recipe_names()
    return path if path.exists() and not shipped else Path(recipe(str(named)))


class _PlainLoader(yaml.SafeLoader):
    """Each key once, integers of bounded size, and 2:4 is a text."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; a text that its tag does not fit is refused."""
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, TypeError) as error:  # of !!timestamp foo, !!int ''
            kind = node.tag.rpartition(":")[2]
            raise _refused(f"{str(node.value)[:80]!r} is no {kind}", node) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; a key that is written twice is refused."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key is no text", key)
            if (key.tag, key.value) in seen:
                raise _refused(f"{key.value!r} is written twice; remove one of both", key)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int | str:
        """Return the integer of a node; one that 64 bits do not hold is refused."""
        # YAML 1.1 reads 2:4 as 124, with digits of base 60; YAML 1.2 does not
        if ":" in node.value:
            return str(node.value)
        value: int = self.construct_yaml_int(node)
        if value.bit_length() > _INTEGER_BITS:
            raise _refused("an integer is too large", node)
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_integer)


def _refused(problem: str, where: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=where.start_mark)


def read_yaml(path: Path, kind: str, next_step: str) -> Any:
    """Return what a YAML file holds (RacError: no such file, or what `parse_yaml` refuses)."""
    with refusing(f"{kind} {path} cannot be read", next_step, OSError, UnicodeDecodeError):
        if path.exists() and regular_file(path, kind).stat().st_size > _BYTES:
            raise RacError(f"{kind} {path} has over {_BYTES} bytes; {next_step}")
        text = path.read_text(encoding="utf-8")
    return parse_yaml(text, f"{path} is not YAML; repair it, or name another file")


def parse_yaml(text: str, message: str) -> Any:
    """Return the plain values that a YAML text holds; a RacError begins with `message`."""
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > _NODES:
            raise ValueError(f"its aliases repeat over {_NODES} values")
        return None if node is None else loader.construct_document(node)
    except RecursionError as error:
        raise RacError(f"{message} (its values are nested too deep)") from error
    except (yaml.YAMLError, ValueError, KeyError) as error:
        raise RacError(f"{message} ({error})") from error


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Count the nodes below `node`, those behind an alias at each of its uses."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = _NODES + 1  # counts for an alias inside of its own anchor
        pairs = isinstance(node, yaml.MappingNode)
        below = [child for pair in node.value for child in pair] if pairs else node.value
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in below)
    return sizes[id(node)]
