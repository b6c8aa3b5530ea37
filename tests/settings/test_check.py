from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings, describe_errors


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tokens: int = 1
    seed: int = 0


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    other: Inner | None = None
    name: str
    text: str = ""

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
        ({"name": "a", "nme": 1}, "nme: there is no such setting (value 1); did you mean name?"),
        (
            {"name": "a", "tokens": 1},
            "tokens: there is no such setting (value 1); did you mean inner.tokens or other.tokens?",
        ),
        (
            {"name": "a", "inner": {"toks": 1}},
            "inner.toks: there is no such setting (value 1); did you mean inner.tokens?",
        ),
        (
            {"name": "a", "inner": {"x": 1}},
            "inner.x: there is no such setting (value 1); use inner.tokens, inner.seed",
        ),
        ({"name": "a", "text": "long"}, "text: is too long; shorten it"),
        (
            {"name": "a", "inner": {"seed": "y" * 200}},
            f"inner.seed: must be a whole number (value '{'y' * 99}...)",
        ),
    ],
)
def test_a_mistake_has_its_key_its_value_and_the_next_step(values, says):
    with pytest.raises(RacError) as caught:
        check_settings(Outer, values, "file.yaml")
    assert str(caught.value) == f"file.yaml: {says}"


def test_without_the_settings_the_next_step_is_the_schema():
    with pytest.raises(ValidationError) as caught:
        Outer(name="a", nme=1)
    assert (
        describe_errors(caught.value) == "nme: there is no such setting (value 1); see `rac schema`"
    )


class Values(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    above: float = Field(1, gt=0)
    least: int = Field(1, ge=2)
    below: float = Field(1, lt=2)
    most: float = Field(1, le=1.5)
    count: int = 1
    number: float = 1
    switch: bool = False
    word: str = Field("a", min_length=1)
    words: list[str] = []
    pair: tuple[int, int] = (0, 0)
    texts: dict[str, str] = {}
    inner: Inner = Inner()
    choice: Literal["keep", "cut"] = "keep"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"above": 0}, "above: must be above 0.0 (value 0)"),
        ({"least": 1}, "least: must be at least 2 (value 1)"),
        ({"below": 2}, "below: must be below 2.0 (value 2)"),
        ({"most": 2}, "most: must be at most 1.5 (value 2)"),
        ({"above": float("nan")}, "above: must be a finite number (value nan)"),
        ({"count": "many"}, "count: must be a whole number (value 'many')"),
        ({"count": 1.5}, "count: must be a whole number (value 1.5)"),
        ({"count": None}, "count: must be a whole number (value None)"),
        ({"number": "many"}, "number: must be a number (value 'many')"),
        ({"number": []}, "number: must be a number (value [])"),
        ({"switch": 3}, "switch: must be true or false (value 3)"),
        ({"switch": []}, "switch: must be true or false (value [])"),
        ({"word": 24}, "word: must be text; put it in quotes (value 24)"),
        ({"word": ""}, "word: must not be empty (value '')"),
        ({"words": "a"}, "words: must be a list, such as [a, b] (value 'a')"),
        ({"pair": 1}, "pair: must be a list, such as [a, b] (value 1)"),
        ({"texts": 1}, "texts: must be settings by name, such as {name: value} (value 1)"),
        ({"inner": 1}, "inner: must be settings by name, such as {name: value} (value 1)"),
        (
            {"choice": "kept"},
            "choice: must be 'keep' or 'cut'; did you mean 'keep'? (value 'kept')",
        ),
        ({"choice": 5}, "choice: must be 'keep' or 'cut' (value 5)"),
        ({"pair": [1]}, "pair.1: is missing; add it"),
    ],
)
def test_what_a_value_has_to_be_in_plain_words(values, says):
    with pytest.raises(RacError) as caught:
        check_settings(Values, values, "file.yaml")
    assert str(caught.value) == f"file.yaml: {says}"
