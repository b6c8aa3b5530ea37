"""Results of an evaluation: the summary of a model's answers, and two models compared."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rac_modifier.errors import RacError
from rac_modifier.evaluation.stopping import Ending, Row, TokenInflation, summary
from rac_modifier.measure import intervals
from rac_modifier.problems.answer_checker import check_installed
from rac_modifier.problems.answers import Verifier
from rac_modifier.problems.source import Problem
from rac_modifier.runtime.files import read_json
from rac_modifier.settings.sampling import PromptSettings, SamplingSettings


class EvalResult(BaseModel):
    """Accuracy and length of a model's answers; compare only results at the same cap.

    Where the problems have no answers, accuracy and its interval are None and `pass_at`, `per_task`
    and `correct_answers` are empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    problems: int
    samples: int  # answers per problem
    correct: int | None  # answers
    accuracy: float | None  # pass@1: the mean over problems of the share of correct answers
    ci_low: float | None  # 95 %, of `intervals.share_interval`
    ci_high: float | None
    pass_at: dict[str, float]  # pass@k for k = 1, 2, 4 ... up to `samples`
    mean_thinking_tokens: float
    mean_completion_tokens: float
    unfinished_share: float  # of all answers, those cut off at the cap
    tokens_per_second: float  # of this run; 0.0 where it generated nothing
    seconds: float  # generation only, without loading the model and checking answers
    cap: int  # most new tokens per problem
    temperature: float
    seed: int
    per_task: dict[str, float]  # accuracy of each named task
    correct_answers: dict[str, int]  # by problem; what two results are paired by
    endings: dict[str, list[Ending]]  # by problem, an ending per sample

    def stopping(self) -> dict[str, float]:
        """Return `stopping.summary` of the endings."""
        return summary(self.endings, graded=self.accuracy is not None)

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        *,
        label: str,
        seconds: float,
        sampling: SamplingSettings,
        generated: int | None = None,
    ) -> Self:
        """Summarise rows, as many per problem; `generated` tokens took `seconds` (None: all)."""
        by_problem: dict[str, list[Row]] = {}
        for row in rows:
            by_problem.setdefault(row.id, []).append(row)
        (samples,) = {len(answers) for answers in by_problem.values()}
        graded = [row for row in rows if row.correct is not None]
        correct = {row.id: 0 for row in graded}
        for row in graded:
            correct[row.id] += bool(row.correct)
        shares = [count / samples for count in correct.values()]
        low, high = intervals.share_interval(shares) if graded else (None, None)
        tasks = sorted({row.task for row in graded if row.task is not None})
        tokens = sum(row.ending.tokens for row in rows) if generated is None else generated
        return cls(
            label=label,
            problems=len(by_problem),
            samples=samples,
            correct=sum(correct.values()) if graded else None,
            accuracy=fmean(shares) if graded else None,
            ci_low=low,
            ci_high=high,
            pass_at=intervals.mean_pass_at(list(correct.values()), samples) if graded else {},
            mean_thinking_tokens=fmean(row.ending.thinking_tokens for row in rows),
            mean_completion_tokens=fmean(row.ending.tokens for row in rows),
            unfinished_share=fmean(row.ending.truncated for row in rows),
            tokens_per_second=tokens / seconds if tokens else 0.0,
            seconds=seconds,
            cap=sampling.max_new_tokens,
            temperature=sampling.temperature or 0.0,
            seed=sampling.seed,
            per_task={
                task: fmean(bool(row.correct) for row in graded if row.task == task)
                for task in tasks
            },
            correct_answers=correct,
            endings={name: [row.ending for row in answers] for name, answers in by_problem.items()},
        )


def check_problems(
    problems: Sequence[Problem], verifier: Verifier | None, *, ungraded: bool = False
) -> None:
    """Refuse problems that cannot be graded by `verifier`, or without one by math-verify."""
    if not problems:
        raise RacError("no problems to evaluate on; check the problem source and its limit")
    if ungraded and all(problem.answer is None for problem in problems):
        return
    without = [p.id for p in problems if p.answer is None or not p.answer.strip()]
    if without:
        raise RacError(
            f"{len(without)} of {len(problems)} problems have no answer (first: {without[0]!r}); "
            "complete them, name the column of answers (answer_column), or measure without grading "
            "(rac eval --stopping; in a grid without answer_column)"
        )
    if verifier is None:
        check_installed("mathematics")


@dataclass(frozen=True)
class PairedDifference:
    """What the second of two models lost or gained, on the same problems."""

    first: str
    second: str
    problems: int
    difference: float | None  # second accuracy minus first accuracy; None: not graded
    ci_low: float | None  # 95 %, of `intervals.difference_interval`
    ci_high: float | None
    only_first: int | None  # problems that the first model alone solves; None: several answers
    only_second: int | None
    p_value: float | None  # McNemar's exact two-sided test
    inflation: TokenInflation
    truncated_only_first: int | None  # answers that the first model alone does not finish
    truncated_only_second: int | None
    truncated_p_value: float | None  # as `p_value`

    def describe_truncated(self) -> str | None:
        """Describe the difference of truncated answers in a line, if there is one."""
        if not self.truncated_only_first and not self.truncated_only_second:
            return None
        return (
            f"truncated: {self.truncated_only_second} answers of {self.second} alone, "
            f"{self.truncated_only_first} of {self.first} alone "
            f"(McNemar p = {self.truncated_p_value:.2g})"
        )

    def describe(self) -> str | None:
        """Describe the difference in a line, if the answers were graded."""
        if self.difference is None or self.ci_low is None or self.ci_high is None:
            return None
        low, high = 100 * self.ci_low, 100 * self.ci_high
        text = f"{self.second} against {self.first}: {100 * self.difference:+.1f} points "
        text += f"({low:+.1f} to {high:+.1f})"
        if self.p_value is None:
            return f"{text}, paired over {self.problems} problems"
        return (
            f"{text}; of {self.problems} problems {self.only_first} are solved by {self.first} "
            f"alone, {self.only_second} by {self.second} alone (McNemar p = {self.p_value:.2g})"
        )

    @classmethod
    def of(cls, first: EvalResult, second: EvalResult) -> Self:
        """Compare two results on the same problems (RacError: others, or asked otherwise)."""
        for name in ("cap", "samples", "temperature", "seed"):
            if getattr(first, name) != getattr(second, name):
                raise RacError(
                    f"{first.label} and {second.label} cannot be paired: {name} "
                    f"{getattr(first, name)} and {getattr(second, name)}; evaluate both alike"
                )
        if differing := sorted(first.endings.keys() ^ second.endings.keys()):
            raise RacError(
                f"{first.label} and {second.label} were asked other problems ({len(differing)} "
                f"differ, the first is {differing[0]!r}); evaluate both on the same"
            )
        right, differences = second.correct_answers, []
        if right:  # graded
            differences = [
                (right[name] - count) / first.samples
                for name, count in first.correct_answers.items()
            ]
        longer = [
            b.truncated - a.truncated
            for name, answers in first.endings.items()
            for a, b in zip(answers, second.endings[name], strict=True)
        ]
        difference = low = high = None
        if differences:
            difference, (low, high) = fmean(differences), intervals.difference_interval(differences)
        lost, gained, p_value = _one_sided(differences, first.samples)
        fewer, more, truncated_p_value = _one_sided(longer, first.samples)
        return cls(
            first=first.label,
            second=second.label,
            problems=len(first.endings),
            difference=difference,
            ci_low=low,
            ci_high=high,
            only_first=lost,
            only_second=gained,
            p_value=p_value,
            inflation=TokenInflation.of(first.endings, second.endings, first.cap),
            truncated_only_first=fewer,
            truncated_only_second=more,
            truncated_p_value=truncated_p_value,
        )


def _one_sided(
    differences: Sequence[float], samples: int
) -> tuple[int, int, float] | tuple[None, None, None]:
    """Count negative and positive differences of single answers; with McNemar's p value."""
    if samples > 1 or not differences:
        return None, None, None
    first, second = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return first, second, intervals.mcnemar(first, second)


def read_results(path: Path, sampling: SamplingSettings) -> list[EvalResult]:
    """Read the file that `rac eval --json FILE` wrote, to pair it with answers sampled so.

    RacError: there is none, it is of another version, or has another prompt or top-p.
    """
    prompt = PromptSettings.of(sampling)
    content = read_json(path, "write it with: rac eval DENSE --json FILE")
    results = content.get("results")
    if not isinstance(results, list) or not results:
        raise RacError(f"{path} holds no accuracies; write it with: rac eval DENSE --json FILE")
    try:
        asked = PromptSettings.model_validate(content.get("prompt"))
        if asked != prompt:
            raise RacError(
                f"{path} cannot be paired: {asked.describe()} there, and {prompt.describe()} here; "
                "evaluate both alike (--template, --system-prompt, --thinking)"
            )
        top_p = (content.get("protocol") or {}).get("top_p")
        if sampling.temperature and top_p != sampling.top_p:
            raise RacError(
                f"{path} cannot be paired: top-p {top_p} there, and {sampling.top_p} here; "
                "evaluate both alike (--top-p)"
            )
        return list(map(EvalResult.model_validate, results))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RacError(
            f"{path}: no evaluation result ({field}: {first['msg']}); evaluate with this version"
        ) from error


def check_json_out(path: Path, baseline: Path | None = None) -> None:
    """Refuse a file that cannot be written, is the baseline or holds other content (RacError)."""
    if baseline is not None and path.resolve() == baseline.resolve():
        raise RacError(f"--json {path}: --baseline reads this file; name a new one")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RacError(f"--json {path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise RacError(f"--json {path}: its folder cannot be written to; name another one")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    content: dict[str, Any] = {}
    with suppress(RacError):  # a folder, or no JSON
        content = read_json(path)
    if "prompt" not in content or not {"results", "divergence"} & content.keys():
        raise RacError(f"--json {path}: is there, and not of an earlier rac eval; name a new file")
