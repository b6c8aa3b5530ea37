import pytest
from pydantic import ValidationError

from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.traces import TraceSettings


@pytest.mark.parametrize(
    ("source", "generator", "file"),
    [
        ("arithmetic", True, False),
        ("reasoning-gym:chain_sum", True, False),
        ("folder/problems.parquet", False, True),
        ("open-r1/OpenR1-Math-220k", False, False),
    ],
)
def test_kinds_of_sources(source, generator, file):
    made = ProblemSource(source=source)
    assert (made.is_generator, made.is_file) == (generator, file)
    assert TraceSettings().named(source).problems == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"column": "q"}, "column: 'q' has no effect since source 'arithmetic' generates its"),
        ({"source": "a.json", "config": "en"}, "config: 'en' has no effect since source 'a.json'"),
        ({"source": "a.csv"}, "is no table that is read"),
        ({"source": ""}, "at least 1 character"),
    ],
)
def test_what_does_not_apply_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        ProblemSource(**values)
    assert message in str(caught.value)
