import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

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
            f"inner.seed: Input should be a valid integer, unable to parse string as an integer (value '{'y' * 99}...)",
        ),
    ],
)
def test_a_mistake_has_its_key_its_value_and_the_next_step(values, says):
    with pytest.raises(RacError) as caught:
        check_settings(Outer, values, "file.yaml")
    assert str(caught.value) == f"file.yaml: {says}"


def test_a_value_of_a_hundred_characters_is_whole():
    with pytest.raises(RacError, match=f"value '{'y' * 98}'\\)$"):
        check_settings(Outer, {"name": "a", "inner": {"seed": "y" * 98}}, "f")


def test_without_the_settings_the_next_step_is_the_schema():
    with pytest.raises(ValidationError) as caught:
        Outer(name="a", nme=1)
    assert describe_errors(caught.value) == "nme: there is no such setting (value 1); see `rac schema`"


def test_right_settings_come_back():
    assert check_settings(Outer, {"name": "a", "inner": {"seed": 3}}, "f") == Outer(name="a", inner=Inner(seed=3))
