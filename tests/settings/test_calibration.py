import pytest
from pydantic import ValidationError

from rac_modifier.settings.calibration import CalibrationSettings, part_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": {"traces": 0.5, "prompts": 0.4}}, "sum to 0.9"),
        ({"mixture": {"traces": 1.5, "prompts": -0.5}}, "traces the share 1.5"),
        ({"mixture": {"thoughts": 1.0}}, "'thoughts'; the kinds are traces, prompts, generic"),
        ({"mixture": {"traces": float("nan")}}, "finite"),
        ({"tokens": 1e30}, "exceeded maximum size"),
        ({"mixture": "traces@0.7, text:c4@0.3"}, "text:c4, which is no text"),
        ({"mixture": "traces, generic@0.5"}, "'traces' has no share; write it like"),
        ({"mixture": "traces@much"}, "'traces@much' has no share"),
        ({"mixture": "traces:@1"}, "'traces:'; the kinds are"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        CalibrationSettings(**values)
    assert message in str(caught.value)


def test_a_mixture_in_one_line_is_the_same_mixture():
    mixture = "traces:math@0.7, text:a.txt@0.1 ,traces:code@0.2, prompts@0"
    line = CalibrationSettings(mixture=mixture)
    spelled = {"text:a.txt": 0.1, "traces:math": 0.7, "traces:code": 0.2, "prompts": 0.0}
    assert line == CalibrationSettings(mixture=spelled)
    assert list(line.mixture) == ["traces:math", "traces:code", "generic:a.txt"], "order of kinds"
    assert CalibrationSettings(**line.model_dump()) == line
    assert (line.text("a.txt").source, line.text(None)) == ("a.txt", line.generic)


def test_names_may_hold_commas_colons_and_at_signs():
    line = "traces:reasoning-gym:gcd,chain_sum@0.25, prompts:a@b/c.jsonl@0.25, text@0.5"
    settings = CalibrationSettings(mixture=line)
    assert settings.mixture == {
        "traces:reasoning-gym:gcd,chain_sum": 0.25,
        "prompts:a@b/c.jsonl": 0.25,
        "generic": 0.5,
    }
    assert settings.share("generic") == 0.5
    assert [part.name for part in settings.parts("prompts", "generic")] == ["a@b/c.jsonl", None]
    assert list(part_tokens(settings.mixture, 103).values()) == [26, 26, 51]
