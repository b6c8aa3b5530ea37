import pytest
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.settings.traces import SelectSettings, TraceSettings


def test_a_named_source_has_its_own_problems_and_store():
    settings = TraceSettings(
        store="all.jsonl",
        sampling={"samples_per_problem": 2},
        select={"finished": True},
        sources={
            "math": {"problems": {"source": "reasoning-gym:gcd"}, "select": {"min_tokens": 3}},
            "code": {"problems": {"source": "code.jsonl"}},
        },
    )
    assert settings.named(None) is settings
    for name, source, finished in (
        ("math", "reasoning-gym:gcd", False),
        ("code", "code.jsonl", True),
        ("org/data", "org/data", True),
    ):
        named = settings.named(name)
        assert (named.store, named.problems.source) == (None, source)
        assert (named.select.finished, named.sampling) == (finished, settings.sampling)
    with pytest.raises(RacError, match=r"traces:maths, .* traces\.sources \(math, code\)"):
        settings.named("maths")


def test_a_selection_that_the_sampling_cannot_meet_is_refused_early():
    with pytest.raises(ValidationError, match=r"can never be met with sampling\.max_new_tokens=50"):
        TraceSettings(sampling={"max_new_tokens": 50}, select={"min_tokens": 51})
    source = {"problems": {"source": "arithmetic"}, "select": {"pass_rate": [0, 1]}}
    with pytest.raises(ValidationError, match="samples_per_problem to 2 or more"):
        TraceSettings(sources={"math": source})


def test_a_selection_that_nothing_meets_is_refused():
    with pytest.raises(ValidationError, match="min_tokens=9 is above max_tokens=8"):
        SelectSettings(min_tokens=9, max_tokens=8)
    with pytest.raises(ValidationError, match="give the lowest share first"):
        SelectSettings(pass_rate=[0.8, 0.2])


def test_what_checks_answers():
    assert SelectSettings(answers="wrong").checks_answers
    assert SelectSettings(pass_rate=[0, 1]).checks_answers
    assert not SelectSettings(finished=True, min_tokens=1).checks_answers
