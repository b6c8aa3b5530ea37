import pytest
from pydantic import ValidationError

from rac_modifier.settings.problems import ProblemSource


@pytest.mark.parametrize(
    ("source", "generator", "file"),
    [
        ("arithmetic", True, False),
        ("reasoning-gym:chain_sum", True, False),
        ("problems.jsonl", False, True),
        ("folder/problems.parquet", False, True),
        ("open-r1/OpenR1-Math-220k", False, False),
    ],
)
def test_kinds_of_sources(source, generator, file):
    made = ProblemSource(source=source)
    assert (made.is_generator, made.is_file) == (generator, file)
    assert ProblemSource.looks_like(source)


def test_a_plain_word_is_no_source():
    assert not ProblemSource.looks_like("math")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"column": "q"},
            "column: 'q' has no effect since source 'arithmetic' generates its problems; leave it",
        ),
        (
            {"source": "a.json", "config": "en"},
            "config: 'en' has no effect since source 'a.json' is a file",
        ),
        ({"source": "a.json", "split": "test"}, "split: 'test' has no effect"),
        ({"source": ""}, "at least 1 character"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"limits": 5}, "Extra inputs"),
    ],
)
def test_what_does_not_apply_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        ProblemSource(**values)
    assert message in str(caught.value)


def test_a_known_dataset_has_its_columns():
    made = ProblemSource(source="open-r1/OpenR1-Math-220k", limit=3)
    assert (made.column, made.answer_column) == ("problem", "answer")
    assert ProblemSource(source="open-r1/OpenR1-Math-220k", column="question").column == "question"
    assert ProblemSource(source="open-r1/OpenR1-Math-220k", column=None).column == "problem"


def test_another_configuration_has_other_columns():
    assert ProblemSource(source="open-r1/codeforces").config == "verifiable-prompts"
    made = ProblemSource(source="open-r1/codeforces", config="default")
    assert (made.config, made.column) == ("default", None)
