"""Patterns that recipes use pass; those that cannot be compiled, or backtrack without end, do not."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.name_patterns import check_names


@pytest.mark.parametrize(
    "name",
    [
        "Linear",
        "model.layers.0.mlp.down_proj",
        "re:.*q_proj$",
        r"re:.*layers\.(0|1|2)\.mlp\..*_proj$",
        "re:^(?!.*lm_head).*",
        r"re:.*\.layers\.\d+\..*\.experts\.\d+\.(gate|up|down)_proj",
        r"re:(?:\d\.)+x",
        "re:(?i).*[qk]_PROJ|.*down_proj",
    ],
)
def test_usual_names_pass(name: str) -> None:
    check_names([name], "targets")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(a?a?)*$",
        "a?" * 40,
        "(a|aa)" * 33,
        ".*a" * 8,
        "(x{1,3}){2,4}",
        r"(.*)\1",
    ],
)
def test_a_pattern_that_backtracks_without_end_is_refused(pattern: str) -> None:
    with pytest.raises(RacError, match=r"targets: 're:.*could take too long to match"):
        check_names([f"re:{pattern}"], "targets")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["re:("], "is no regular expression"),
        (["re:x{1,99999999999}"], "is no regular expression"),
        (["re:" + "(" * 497], "is no regular expression"),
        (["x" * 501], "has over 500 characters"),
        (["x\x1b[2J"], "or unprintable ones"),
        ([""], "write names or re: patterns as text"),
        ([3], "targets holds '3'"),
        ("Linear", "write a list"),
        (None, "write a list"),
    ],
)
def test_what_names_no_module_is_refused(names: object, message: str) -> None:
    with pytest.raises(RacError, match=message):
        check_names(names, "targets")
