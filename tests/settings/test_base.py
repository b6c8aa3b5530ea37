import pytest
from pydantic import ValidationError

from rac_modifier.settings.base import Settings, keep_as_written, without_paths, written_value


class Inner(Settings):
    number: int = 1
    other: int | None = None


class Outer(Settings):
    inner: Inner = Inner()
    named: dict[str, Inner] = {}
    on: bool = False


def test_unknown_names_and_changes_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs"):
        Inner(numbr=2)
    with pytest.raises(ValidationError, match="frozen"):
        Inner().number = 2


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({}, ("on",), None),
        ({"on": False}, ("on",), False),
        ({"inner": {"number": 1}}, ("inner", "number"), 1),  # the default, but written
        ({"inner": {"number": 1}}, ("inner", "other"), None),
        ({"inner": {}}, ("inner",), None),
        ({"inner": {"other": None}}, ("inner",), None),  # null is as if it was left out
        ({"inner": {"number": 2}}, ("inner",), Inner(number=2)),
        ({"named": {}}, ("named",), None),
        ({"named": {"a": {"number": 3}}}, ("named", "a", "number"), 3),
        ({"named": {"a": {"number": 3}}}, ("named", "b", "number"), None),
        ({"on": True}, ("on", "deeper"), None),
    ],
)
def test_what_the_user_wrote(values, path, expected):
    assert written_value(Outer(**values), path) == expected


def test_what_a_preset_filled_in_was_not_written():
    filled = Inner(number=2, other=3)
    keep_as_written(filled, {"other": 3})
    assert filled.number == 2
    assert written_value(filled, ("number",)) is None
    assert written_value(filled, ("other",)) == 3


def test_a_dump_without_some_paths_holds_plain_types():
    dump = {"a": {"b": 1, "c": (1, {"d": 2})}, "e": [3], "f": None}
    assert without_paths(dump, {("a", "b"), ("f",), ("nowhere", "x")}) == {
        "a": {"c": [1, {"d": 2}]},
        "e": [3],
    }
    assert dump["a"] == {"b": 1, "c": (1, {"d": 2})}  # as it was
