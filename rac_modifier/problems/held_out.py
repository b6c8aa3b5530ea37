"""Problems for evaluation; by default none of them can be in a calibration set."""

from __future__ import annotations

from itertools import islice

from rac_modifier.errors import RacError
from rac_modifier.problems.arithmetic import generate_distinct
from rac_modifier.problems.source import Problem, load_problems
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.problems import ProblemSource


def held_out_problems(
    source: str,
    count: int,
    seed: int = 0,
    column: str | None = None,
    answer_column: str | None = None,
    split: str = "train",
) -> list[Problem]:
    """`count` problems with answers: the test split of "arithmetic", or the first problems of any other source for this seed.

    Only "arithmetic" is disjoint from calibration by construction. With another source, calibrate on other problems.

    Raises:
        RacError: settings that do not apply to the source, fewer problems than asked for, or what `load_problems` raises.
    """
    if count < 1:
        raise RacError(f"{count} problems cannot be evaluated; ask for at least 1")
    values = {"source": source, "column": column, "answer_column": answer_column, "split": split}
    asked = check_settings(ProblemSource, values, "problems")
    if source == "arithmetic":
        try:
            solved = generate_distinct(seed, "test", count)
        except ValueError as error:
            raise RacError(str(error)) from error
        return [
            Problem(f"{s.task}:{','.join(map(str, s.operands))}", s.question, s.answer, s.task)
            for s in solved
        ]
    problems = list(islice(load_problems(asked, seed), count))
    if len(problems) < count:
        raise RacError(
            f"{source} gave {len(problems)} problems of the {count} asked for; ask for fewer"
        )
    return problems
