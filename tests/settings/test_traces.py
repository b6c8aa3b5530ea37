import pytest
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.settings.traces import SelectSettings, TraceSettings


def test_a_named_source_takes_over_what_it_does_not_set():
    settings = TraceSettings(
        store="all.jsonl",
        sampling={"max_new_tokens": 99, "samples_per_problem": 2},
        select={"finished": True},
        sources={
            "math": {
                "problems": {"source": "reasoning-gym:gcd"},
                "select": {"pass_rate": [0.2, 0.8]},
            },
            "code": {"problems": {"source": "code.jsonl"}, "store": "code-traces.jsonl"},
        },
    )
    math, code, itself = settings.named("math"), settings.named("code"), settings.named("org/data")
    assert settings.named(None) is settings
    assert (math.store, math.sampling.max_new_tokens, math.select.finished) == (None, 99, False)
    assert (code.store, code.select.finished) == ("code-traces.jsonl", True)
    assert (itself.store, itself.problems.source, itself.select.finished) == (
        None,
        "org/data",
        True,
    )
    with pytest.raises(
        RacError, match=r"traces:maths, which is not among traces\.sources \(math, code\)"
    ):
        settings.named("maths")


def test_a_selection_that_the_sampling_cannot_meet_is_refused_early():
    with pytest.raises(ValidationError, match=r"can never be met with sampling\.max_new_tokens=50"):
        TraceSettings(sampling={"max_new_tokens": 50}, select={"min_tokens": 51})
    source = {"problems": {"source": "arithmetic"}, "select": {"pass_rate": [0, 1]}}
    with pytest.raises(ValidationError, match="samples_per_problem to 2 or more"):
        TraceSettings(sources={"math": source})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "leave no length between them"),
        ({"pass_rate": [0.8, 0.2]}, "give the lowest and the highest share"),
        ({"pass_rate": [0.5, 1.5]}, "less than or equal to 1"),
        ({"answers": "right"}, "'any', 'correct' or 'wrong'"),
    ],
)
def test_a_selection_that_nothing_meets_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        SelectSettings(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "checks", "all_kept"),
    [
        ({}, False, True),
        ({"answers": "wrong"}, True, False),
        ({"pass_rate": [0, 1]}, True, False),
        ({"finished": True}, False, False),
        ({"min_tokens": 1}, False, False),
        ({"max_tokens": 1}, False, False),
    ],
)
def test_what_a_selection_looks_at(values, checks, all_kept):
    select = SelectSettings(**values)
    assert (select.checks_answers, select.keeps_all) == (checks, all_kept)
