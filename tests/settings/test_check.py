"""What all settings share, how a mistake is told, and which `re:` patterns could match without
end."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import (
    Settings,
    check_names,
    check_settings,
    describe_errors,
    keep_as_written,
    without_paths,
    written_value,
)


class Inner(Settings):
    tokens: int = 1
    seed: int | None = None


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    other: Inner | None = None
    named: dict[str, Inner] = {}
    text: str = ""
    on: bool = False
    above: float = Field(1, gt=0)
    choice: Literal["keep", "cut"] = "keep"

    @field_validator("text")
    @classmethod
    def _short(cls, text: str) -> str:
        if len(text) > 3:
            raise RacError("text: is too long; shorten it")
        return text


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({}, ("on",), None),
        ({"on": False}, ("on",), False),
        ({"inner": {"tokens": 1}}, ("inner", "tokens"), 1),  # the default, but written
        ({"inner": {"tokens": 1}}, ("inner", "seed"), None),
        ({"inner": {}}, ("inner",), None),
        ({"inner": {"seed": None}}, ("inner",), None),  # null is as if it was left out
        ({"inner": {"tokens": 2}}, ("inner",), Inner(tokens=2)),
        ({"named": {}}, ("named",), None),
        ({"named": {"a": {"tokens": 3}}}, ("named", "a", "tokens"), 3),
        ({"named": {"a": {"tokens": 3}}}, ("named", "b", "tokens"), None),
        ({"on": True}, ("on", "deeper"), None),
    ],
)
def test_what_the_user_wrote(values, path, expected):
    assert written_value(Outer(name="a", **values), path) == expected


def test_what_a_preset_filled_in_was_not_written():
    filled = Inner(tokens=2, seed=3)
    keep_as_written(filled, {"seed": 3})
    assert (written_value(filled, ("tokens",)), written_value(filled, ("seed",))) == (None, 3)
    with pytest.raises(ValidationError, match="frozen"):
        filled.tokens = 2


def test_a_dump_without_some_paths_holds_plain_types():
    dump = {"a": {"b": 1, "c": (1, {"d": 2})}, "e": [3], "f": None}
    assert without_paths(dump, {("a", "b"), ("f",), ("nowhere", "x")}) == {
        "a": {"c": [1, {"d": 2}]},
        "e": [3],
    }
    assert dump["a"] == {"b": 1, "c": (1, {"d": 2})}  # as it was


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "name: is missing; add it"),
        ({"nme": 1}, "nme: there is no such setting (value 1); did you mean name?"),
        ({"tokens": 1}, "(value 1); did you mean inner.tokens or other.tokens or named.tokens?"),
        ({"inner": {"x": 1}}, "(value 1); use inner.tokens, inner.seed"),
        ({"inner": {"sweeps": 1}}, "leave it out: rounded weights get three sweeps"),
        ({"text": "long"}, "text: is too long; shorten it"),
        ({"above": 0}, "above: must be greater than 0 (value 0)"),
        ({"above": float("nan")}, "above: must be a finite number (value nan)"),
        ({"on": 3}, "on: must be a valid boolean, unable to interpret input (value 3)"),
        ({"text": 24}, "text: must be a valid string (value 24)"),
        ({"choice": "kept"}, "must be 'keep' or 'cut'; did you mean 'keep'? (value 'kept')"),
        ({"inner": {"seed": "y" * 200}}, "unable to parse string as an integer (value "
            f"'{'y' * 99}...)"),
    ],
)  # fmt: skip
def test_a_mistake_has_its_key_its_value_and_the_next_step(values, says):
    with pytest.raises(RacError) as caught:
        check_settings(Outer, {"name": "a", **values} if values else {}, "file.yaml")
    assert str(caught.value).startswith("file.yaml: ")
    assert str(caught.value).endswith(says)


def test_without_the_settings_the_next_step_is_the_schema():
    with pytest.raises(ValidationError) as caught:
        Outer(name="a", nme=1)
    assert describe_errors(caught.value).endswith("(value 1); see `rac schema`")


def test_usual_names_pass():
    check_names(
        [
            "model.layers.0.mlp.down_proj",
            "re:.*q_proj$",
            r"re:.*layers\.(0|1|2)\.mlp\..*_proj$",
            "re:^(?!.*lm_head).*",
            r"re:.*\.layers\.\d+\..*\.experts\.\d+\.(gate|up|down)_proj",
            r"re:(?:\d\.)+x",
            "re:(?i).*[qk]_PROJ|.*down_proj",
        ],
        "targets",
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        *(
            ([f"re:{pattern}"], "could take too long to match")
            for pattern in (
                "(a+)+$", "(a|a)*$", "(a?a?)*$", "a?" * 40, "(a|aa)" * 33, ".*a" * 8,
                "(x{1,3}){2,4}", r"(.*)\1",
            )
        ),
        (["re:("], "is no regular expression"),
        (["re:x{1,99999999999}"], "is no regular expression"),
        (["re:" + "(" * 497], "is no regular expression"),
        (["x" * 501], "has over 500 characters"),
        (["x\x1b[2J"], "or unprintable ones"),
        ([""], "write names or re: patterns as text"),
        ([3], "holds '3'"),
        ("Linear", "write a list"),
        (None, "write a list"),
    ],
)  # fmt: skip
def test_what_names_no_module_or_backtracks_without_end_is_refused(names, message):
    with pytest.raises(RacError, match=f"targets.*{message}"):
        check_names(names, "targets")
