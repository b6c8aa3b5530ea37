"""Results of an evaluation: a row per answer, their summary, two models compared, tables."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from rac_modifier.errors import RacError
from rac_modifier.evaluation import intervals
from rac_modifier.evaluation.stopping import Ending, Row, TokenInflation, summary, token_inflation
from rac_modifier.files import read_json
from rac_modifier.settings.sampling import PromptSettings, SamplingSettings

if TYPE_CHECKING:  # a table of results needs no torch
    from rac_modifier.evaluation.divergence import DivergenceResult


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


def summarise(
    rows: Sequence[Row],
    *,
    label: str,
    seconds: float,
    sampling: SamplingSettings,
    generated: int | None = None,
) -> EvalResult:
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
    return EvalResult(
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
            task: fmean(bool(row.correct) for row in graded if row.task == task) for task in tasks
        },
        correct_answers=correct,
        endings={name: [row.ending for row in answers] for name, answers in by_problem.items()},
    )


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


def paired_difference(first: EvalResult, second: EvalResult) -> PairedDifference:
    """Compare two results on the same problems (RacError: asked otherwise, or other problems)."""
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
    samples = first.samples
    difference = low = high = lost = gained = p_value = None
    pairs = [
        (first.correct_answers[name] / samples, count / samples)
        for name, count in second.correct_answers.items()
        if name in first.correct_answers
    ]
    if pairs:
        difference = fmean(b - a for a, b in pairs)
        low, high = intervals.difference_interval([b - a for a, b in pairs])
    if pairs and samples == 1:
        lost, gained, p_value = discordant(pairs)
    ended = [
        (a.truncated, b.truncated)
        for problem, answers in first.endings.items()
        for a, b in zip(answers, second.endings[problem], strict=True)
    ]
    truncated = discordant(ended) if samples == 1 else (None, None, None)
    return PairedDifference(
        first=first.label,
        second=second.label,
        problems=len(first.endings),
        difference=difference,
        ci_low=low,
        ci_high=high,
        only_first=lost,
        only_second=gained,
        p_value=p_value,
        inflation=token_inflation(first.endings, second.endings, first.cap),
        truncated_only_first=truncated[0],
        truncated_only_second=truncated[1],
        truncated_p_value=truncated[2],
    )


def discordant(pairs: Sequence[tuple[float, float]]) -> tuple[int, int, float]:
    """Count the pairs whose first and whose second value is larger; with McNemar's p value."""
    first, second = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
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


def check_json_out(path: Path) -> None:
    """Refuse a file that cannot be written, or that holds something else (RacError)."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise RacError(f"--json {path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise RacError(f"--json {path}: its folder cannot be written to; name another one")
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return
    keys: Collection[str] = ()
    with suppress(RacError):  # a folder, or no JSON
        keys = read_json(path).keys()
    if "prompt" not in keys or not {"results", "divergence"} & set(keys):
        raise RacError(f"--json {path}: is there, and not of an earlier rac eval; name a new file")


@dataclass(frozen=True)
class ResultTable:
    """A head, a row per model, and a line on what all rows share."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def accuracy_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return a row per result of one cap, temperature and number of answers per problem."""
    first = results[0]
    columns = {"model": [r.label for r in results]}
    if first.accuracy is not None:
        bounds = [(100 * (r.ci_low or 0), 100 * (r.ci_high or 0)) for r in results]
        columns["accuracy"] = [f"{r.accuracy:.1%}" for r in results]
        columns["95 % CI"] = [f"{low:.1f}-{high:.1f}" for low, high in bounds]
    columns |= {
        "thinking": [f"{r.mean_thinking_tokens:.0f}" for r in results],
        "tokens": [f"{r.mean_completion_tokens:.0f}" for r in results],
        "unfinished": [f"{r.unfinished_share:.1%}" for r in results],
        "tokens/s": [f"{r.tokens_per_second:.0f}" if r.tokens_per_second else "-" for r in results],
        "minutes": [f"{r.seconds / 60:.1f}" for r in results],
        "problems": [str(r.problems) for r in results],
    }
    sampled = f"temperature {first.temperature:g}" if first.temperature else "greedy"
    note = f"At most {first.cap} new tokens per answer; {sampled}"
    if first.samples > 1:
        if first.accuracy is not None:
            columns[f"pass@{first.samples}"] = [f"{r.pass_at[str(r.samples)]:.1%}" for r in results]
        note += f"; {first.samples} answers per problem"
    return ResultTable(tuple(columns), tuple(zip(*columns.values(), strict=True)), f"{note}.")


def stopping_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return the share of each kind of ending and the mean lengths, a row per result."""
    rows = []
    for result in results:
        *shares, thinking, answer = result.stopping().values()
        percentages = (f"{share:.1%}" for share in shares)
        rows.append((result.label, *percentages, f"{thinking:.0f}", f"{answer:.0f}"))
    looping, going = "truncated: looping", "truncated: going"
    kinds: tuple[str, ...] = ("finished", looping, going)
    note = "No answer was compared with a reference."
    if results[0].accuracy is not None:
        kinds = ("right", "wrong", "truncated: reached", looping, going)
        note = (
            "Reached: the last answer stated before the cap is right. Accuracy counts it if boxed."
        )
    head = ("model", *kinds, "closes thinking", "thinking", "answer")
    return ResultTable(head, tuple(rows), note)


def divergence_table(results: "Sequence[DivergenceResult]") -> ResultTable:
    """Return divergences with standard errors, on the same sequences, a row per result."""

    def with_error(mean: float, error: float | None, form: str) -> str:
        return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"

    rows = tuple(
        (
            r.label,
            with_error(r.kl, r.kl_stderr, ".3f"),
            with_error(r.agreement, r.agreement_stderr, ".1%"),
        )
        for r in results
    )
    return ResultTable(
        ("model", "KL, nats per token", "top-1 agreement"),
        rows,
        f"KL(dense || model) on {results[0].tokens:,} completion tokens of "
        f"{results[0].sequences:,} sequences; ± one standard error over sequences, from 16 on.",
    )
