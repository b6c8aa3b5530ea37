"""Plain data passes; what could hang, hide a setting or become another type is refused."""

import os
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.strict_yaml import parse_yaml, read_yaml

NINE = ", ".join(["*{}"] * 9)
LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{NINE.replace('{}', below)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_plain_data() -> None:
    text = "a: [1, 2.5, .inf, yes, null, x]\nday: 2024-01-01\nbase: &b {c: 1}\nd: {<<: *b, e: =}\n"
    assert parse_yaml(text, "bad") == {
        "a": [1, 2.5, float("inf"), True, None, "x"],
        "day": "2024-01-01",
        "base": {"c": 1},
        "d": {"c": 1, "e": "="},
    }
    assert parse_yaml("", "bad") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "its aliases stand for over 100000 values"),
        ("a: &a [*a]", "its aliases stand for"),
        ("[" * 2000, "nested too deep"),
        ("{a: " * 2000, "nested too deep"),
        ("a: 1\nb: 2\na: 3", "'a' is written twice"),
        ("a_stage: {}\na_stage: {}", "'a_stage' is written twice"),
        ("? [a]\n: 1", "a key is no text"),
        ("a: " + "9" * 5000, "4300 digits"),
        ("a: 0x" + "f" * 5000, "an integer is too large"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "bad"),
        ("a: !!binary aGVsbG8=", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: \x00", "unacceptable character"),
        ("a: b: c", "mapping values are not allowed"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RacError, match=f"(?s)^bad \\(.*{message}" if message != "bad" else "^bad"):
        parse_yaml(text, "bad")


def test_a_file_that_is_no_regular_small_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("#" * (1 << 20) + "#")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff")
    for name, message in {
        "pipe.yaml": "is a pipe; name a regular file",
        "large.yaml": "has over 1048576 bytes",
        "bytes.yaml": "cannot be read",
        "no.yaml": "No such file",
    }.items():
        with pytest.raises(RacError, match=message):
            read_yaml(tmp_path / name, "recipe", "name a YAML file")
