"""Read YAML that a user names: plain data alone, each key once, of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rac_modifier.errors import RacError
from rac_modifier.files import regular_file

_BYTES = 1 << 20
_NODES = 100_000  # with the targets of aliases counted at each alias
_INTEGER_BITS = 63
_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
)
_MERGE = "tag:yaml.org,2002:merge"


class _PlainLoader(yaml.SafeLoader):
    """Dates stay text, and tags such as !!binary or !!set are refused."""

    yaml_constructors = {
        **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS},
        None: yaml.SafeLoader.yaml_constructors[None],
    }
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in (*_TAGS, _MERGE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; a key that is written twice is refused."""
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key is no text", problem_mark=key_node.start_mark
                )
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key_node.value!r} is written twice; remove one of both",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """The integer of a node; one that 64 bits do not hold is refused."""
        value: int = self.construct_yaml_int(node)
        if value.bit_length() > _INTEGER_BITS:
            raise yaml.constructor.ConstructorError(
                problem="an integer is too large", problem_mark=node.start_mark
            )
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_integer)


def read_yaml(path: Path, what: str, next_step: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        RacError: no such file (the message ends in `next_step`), a file that is no regular one,
            or what `parse_yaml` refuses.
    """
    try:
        if path.exists() and regular_file(path, what).stat().st_size > _BYTES:
            raise RacError(f"{what} {path} has over {_BYTES} bytes; {next_step}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RacError(f"{what} {path} cannot be read ({error}); {next_step}") from error
    return parse_yaml(text, f"{path} is not YAML; repair it, or name another file")


def parse_yaml(text: str, message: str) -> Any:
    """Return the mappings, lists, texts, numbers, booleans and None that a YAML text holds.

    Raises:
        RacError: begins with `message`; the text is not YAML, holds a key twice, a tag of another
            type, an integer of over 63 bits, or too much behind its aliases.
    """
    try:
        loader = _PlainLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _NODES:
            raise RacError(f"{message} (its aliases stand for over {_NODES} values)")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError) as error:
        if isinstance(error, RacError):
            raise
        raise RacError(f"{message} ({error})") from error
    except RecursionError as error:
        raise RacError(f"{message} (its values are nested too deep)") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the nodes below `node`, those behind an alias at each of its uses."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _NODES + 1  # counts for an alias inside of its own anchor
        pairs = isinstance(node, yaml.MappingNode)
        below = [part for pair in node.value for part in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in below)
    return known[id(node)]
