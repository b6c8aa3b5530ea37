"""What all settings share, how a mistake is told, and which `re:` patterns could match without
end."""

from typing import Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Settings, check_names, check_settings, describe_errors


class Inner(Settings):
    tokens: int = 1
    seed: int | None = None


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    other: Inner | None = None
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
    ("values", "says"),
    [
        ({}, "name: is missing; add it"),
        ({"nme": 1}, "nme: there is no such setting (value 1); did you mean name?"),
        ({"tokens": 1}, "(value 1); did you mean inner.tokens or other.tokens?"),
        ({"inner": {"x": 1}}, "(value 1); use inner.tokens, inner.seed"),
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
            r"re:(?:model\.)?[^(.*+|]*(?<!lm_head)$",
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
                "(x{1,3}){2,4}", r"(.*)\1", "(?P<a>.)(?P=a)", "(?x)(a+) +", "(?#[)(a+)+](?#)",
                "((a)+)+", "([\\])]a+)+", ".*.*.*.*X", r"(\d+)+", r"\d+" * 9,
            )
        ),
        ([f"re:.*a.*b.*{i}" for i in range(11)], "10' could take too long to match"),
        (["re:("], "is no regular expression"),
        (["re:x{1,99999999999}"], "is no regular expression"),
        (["re:" + "(" * 497], "is no regular expression"),
        (["x" * 501], "up to 500 printable"),
        (["x\x1b[2J"], "up to 500 printable"),
        ([""], "holds ''"),
        ([3], "holds '3'"),
        ("Linear", "write a list"),
        (None, "write a list"),
    ],
)  # fmt: skip
def test_what_names_no_module_or_backtracks_without_end_is_refused(names, message):
    with pytest.raises(RacError, match=f"targets.*{message}"):
        check_names(names, "targets")
