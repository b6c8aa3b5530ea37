"""Two models on the same problems: the difference of their accuracies, paired per problem."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.evaluation.intervals import difference_interval, mcnemar
from rac_modifier.evaluation.results import EvalResult
from rac_modifier.evaluation.stopping import TokenInflation, token_inflation
from rac_modifier.files import read_json


@dataclass(frozen=True)
class PairedDifference:
    """What the second of two models lost or gained, on the same problems.

    Attributes:
        difference: accuracy of the second minus that of the first.
        ci_low, ci_high: 95 %, of `intervals.difference_interval`.
        only_first, only_second: problems that a single model solves; None with several answers.
        p_value: McNemar's exact two-sided test; None with several answers per problem.
        inflation: tokens of the second over tokens of the first; None if a result has no endings.
    """

    first: str
    second: str
    problems: int
    difference: float
    ci_low: float
    ci_high: float
    only_first: int | None
    only_second: int | None
    p_value: float | None
    inflation: TokenInflation | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """In one line."""
        low, high = 100 * self.ci_low, 100 * self.ci_high
        text = f"{self.second} against {self.first}: {100 * self.difference:+.1f} points "
        text += f"({low:+.1f} to {high:+.1f})"
        if self.p_value is None:
            return f"{text}, paired over {self.problems} problems"
        return (
            f"{text}; of {self.problems} problems {self.only_first} are solved by {self.first} alone, "
            f"{self.only_second} by {self.second} alone (McNemar p = {self.p_value:.2g})"
        )


def paired_difference(first: EvalResult, second: EvalResult) -> PairedDifference:
    """Compare two results on the same problems, with the same answers per problem and cap.

    Raises:
        RacError: other problems, numbers of answers, or caps.
    """
    for name in ("cap", "samples"):
        if getattr(first, name) != getattr(second, name):
            raise RacError(
                f"{first.label} and {second.label} cannot be paired: {name} {getattr(first, name)} and "
                f"{getattr(second, name)}; evaluate both alike"
            )
    if first.correct_answers.keys() != second.correct_answers.keys():
        other = sorted(first.correct_answers.keys() ^ second.correct_answers.keys())
        raise RacError(
            f"{first.label} and {second.label} were asked other problems ({len(other)} differ, the "
            f"first is {other[0]!r}); evaluate both on the same"
        )
    samples = first.samples
    pairs = [
        (first.correct_answers[name] / samples, count / samples)
        for name, count in second.correct_answers.items()
    ]
    low, high = difference_interval([b - a for a, b in pairs])
    lost = gained = p_value = None
    if samples == 1:
        lost, gained = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
        p_value = mcnemar(lost, gained)
    inflation = None
    if first.endings and second.endings:
        inflation = token_inflation(first.endings, second.endings, first.cap)
    return PairedDifference(
        first=first.label,
        second=second.label,
        problems=len(pairs),
        difference=sum(b - a for a, b in pairs) / len(pairs),
        ci_low=low,
        ci_high=high,
        only_first=lost,
        only_second=gained,
        p_value=p_value,
        inflation=inflation,
    )


def read_results(path: Path) -> list[EvalResult]:
    """The results in a file that `rac eval --json FILE` wrote.

    Raises:
        RacError: not such a file, or one of another version.
    """
    results = read_json(path, "write it with: rac eval DENSE --json FILE").get("results")
    if not isinstance(results, list) or not results:
        raise RacError(f"{path} holds no accuracies; write it with: rac eval DENSE --json {path}")
    try:
        return [EvalResult.from_dict(values) for values in results]
    except (RacError, AttributeError) as error:
        raise RacError(f"{path}: {error}") from error
