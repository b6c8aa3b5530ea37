"""Whether a model still stops: the kind of each ending, and the token inflation of two models."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Literal, Self

from rac_modifier.measure.intervals import Interval, ratio_interval
from rac_modifier.measure.repeats import COPIES, loop_at_end
from rac_modifier.problems.answers import (
    THINK_END,
    Verifier,
    equal_answers,
    extract_answer,
    is_correct,
)
from rac_modifier.problems.source import Problem

# The model ended its answer: right, wrong, or not graded. The cap truncated it: after a right
# statement of the answer, while its end repeated itself, or neither.
Kind = Literal["right", "wrong", "finished", "reached", "looping", "going"]
KINDS: tuple[Kind, ...] = ("right", "wrong", "reached", "looping", "going")  # of graded answers
UNGRADED: tuple[Kind, ...] = ("finished", "looping", "going")
# A number, a Chinese character, a word, or a mark.
_WORD = re.compile(r"\d{1,18}|[\u2e80-\u9fff]|[^\W\d\u2e80-\u9fff]+|[^\w\s]")


@dataclass(frozen=True)
class Loop:
    """The repeating end of a truncated answer."""

    begin: int  # index in the completion of its first token or word
    period: int  # tokens or words
    unit: Literal["tokens", "words"]
    counts: bool = False  # its copies differ by numbers that advance by a constant step

    def character(self, pieces: Sequence[str]) -> int:
        """Return where it begins in the joined text of all tokens (`pieces`)."""
        if self.unit == "tokens":
            return sum(map(len, pieces[: self.begin]))
        return list(_WORD.finditer("".join(pieces)))[self.begin].start()


@dataclass(frozen=True)
class Ending:
    """How an answer ended, and its length."""

    kind: Kind
    tokens: int  # with EOS
    thinking_tokens: int  # up to and including </think>; all tokens where that is missing
    closes: bool  # the text holds </think>, or the prompt did
    loop: Loop | None = None  # of a truncated answer, "reached" included

    @property
    def truncated(self) -> bool:
        """Return whether the cap ended the answer."""
        return self.kind in ("reached", "looping", "going")

    def at_cap(self, cap: int) -> int:
        """Return the tokens; a truncated answer counts as `cap`."""
        return cap if self.truncated else self.tokens


@dataclass(frozen=True)
class Row:
    """An answer to a problem."""

    id: str  # of the problem
    task: str | None
    correct: bool | None  # None: not graded
    ending: Ending


Endings = Mapping[str, Sequence[Ending]]  # by problem, one per sample


@dataclass(frozen=True)
class Inflation:
    """Tokens of the second model over tokens of the first, on the same problems."""

    answers: int  # pairs of answers
    ratio: float  # sum over sum
    ci_low: float | None  # 95 %, of `intervals.ratio_interval`; None with one problem
    ci_high: float | None

    @classmethod
    def of(cls, clusters: Sequence[Sequence[tuple[int, int]]]) -> Self:
        """Return the ratio of pairs of lengths; the pairs of a problem are a cluster."""
        first = [sum(a for a, _ in cluster) for cluster in clusters]
        second = [sum(b for _, b in cluster) for cluster in clusters]
        interval: Interval | tuple[None, None] = (None, None)
        if len(clusters) > 1:
            interval = ratio_interval(second, first)
        return cls(sum(map(len, clusters)), sum(second) / sum(first), *interval)

    def describe(self) -> str:
        """Describe the ratio, for example "x1.25 (1.11 to 1.40)"."""
        text = f"x{self.ratio:.2f}"
        return text if self.ci_low is None else f"{text} ({self.ci_low:.2f} to {self.ci_high:.2f})"


@dataclass(frozen=True)
class TokenInflation:
    """Inflation on answers that both models finish (None: there are none), and on all answers."""

    both_finish: Inflation | None
    at_cap: Inflation  # truncated answers counted at the cap

    def describe(self, first: str, second: str) -> str:
        """Describe both ratios."""
        finished = self.both_finish
        text = f"tokens of {second} over {first}: "
        if finished is not None:
            text += f"{finished.describe()} on {finished.answers} answers that both finish; "
        return f"{text}{self.at_cap.describe()} on all {self.at_cap.answers} (truncated: the cap)"

    @classmethod
    def of(cls, first: Endings, second: Endings, cap: int) -> Self:
        """Compare the lengths of answers to the same problems, sample by sample."""
        finished, everything = [], []
        for problem in first:
            pairs = list(zip(first[problem], second[problem], strict=True))
            everything.append([(a.at_cap(cap), b.at_cap(cap)) for a, b in pairs])
            finished.append(
                [(a.tokens, b.tokens) for a, b in pairs if not (a.truncated or b.truncated)]
            )
        clusters = [cluster for cluster in finished if cluster]
        return cls(Inflation.of(clusters) if clusters else None, Inflation.of(everything))


def summary(endings: Endings, *, graded: bool = True) -> dict[str, float]:
    """Return the share of each kind, the share that closes its thinking, and mean lengths."""
    answers = [ending for samples in endings.values() for ending in samples]
    kinds = KINDS if graded else UNGRADED
    shares = {kind: fmean(ending.kind == kind for ending in answers) for kind in kinds}
    thinking = fmean(ending.thinking_tokens for ending in answers)
    return shares | {
        "closes_thinking": fmean(ending.closes for ending in answers),
        "thinking_tokens": thinking,
        "answer_tokens": fmean(ending.tokens for ending in answers) - thinking,
    }


def describe_loops(label: str, endings: Endings) -> list[str]:
    """Return a line per unit of loops: their number, and medians of begin and period."""
    loops = [ending.loop for samples in endings.values() for ending in samples if ending.loop]
    lines = []
    for unit in ("tokens", "words"):
        if alike := [loop for loop in loops if loop.unit == unit]:
            begin = median(loop.begin for loop in alike)
            period = median(loop.period for loop in alike)
            lines.append(
                f"{label}: {len(alike)} truncated answers repeat themselves, from {begin:.0f} "
                f"{unit} on, every {period:.0f} {unit} (medians)."
            )
    return lines


def row_of_text(
    problem: Problem,
    text: str,
    verifier: Verifier | None = None,
    *,
    finish: str,
    tokens: int,
    thinking_tokens: int,
    ids: Sequence[int] = (),
) -> Row:
    """Check the answer in a completion, and classify its ending; `finish` "length": truncated.

    Without `ids` of its tokens, a loop is counted in words. A problem without an answer is not
    graded. `thinking_tokens` 0: the prompt closed the thinking.
    """
    reference, loop, correct = problem.answer, None, None
    verifier = verifier or problem.verifier
    kind: Kind = "finished"
    if reference is not None:
        correct = is_correct(text, reference, verifier)
        kind = "right" if correct else "wrong"
    if finish == "length":
        loop, before_counting = _loop(text, ids)
        kind = "looping" if loop else "going"
        if reference is not None and (
            correct or states_answer(before_counting, reference, verifier, problem.question)
        ):
            kind = "reached"
    closes = THINK_END in text or not thinking_tokens
    ending = Ending(kind, tokens, thinking_tokens, closes, loop)
    return Row(problem.id, problem.task, correct, ending)


def _loop(text: str, ids: Sequence[int]) -> tuple[Loop | None, str]:
    """Return the loop at the end, and the text without a loop that counts past the answer."""
    if repeated := loop_at_end(ids):
        return Loop(*repeated, "tokens"), text
    matches = list(_WORD.finditer(text))[:-1]  # the last word may be cut
    words = [match.group() for match in matches]
    if repeated := loop_at_end(words):
        return Loop(*repeated, "words"), text
    if repeated := loop_at_end(["0" if word.isdecimal() else word for word in words]):
        begin, shortest = repeated
        for period in (shortest, 2 * shortest):  # one number may alternate while another counts
            counters = (i for i in range(begin + 2 * period, len(words)) if words[i].isdecimal())
            steps = ([int(words[i - k * period]) for k in (0, 1, 2)] for i in counters)
            copies = (len(words) - begin) // period
            if copies >= COPIES and all(last - mid == mid - first for last, mid, first in steps):
                return Loop(begin, period, "words", counts=True), text[: matches[begin].start()]
    return None, text


# The answer that a text states last, in English: `\boxed{X}`, or "the answer is X" in a sentence
# that ends. A text without either may state it as `= X` or `-> X` at the end of a line. Other
# numbers do not count.
_NOUN = r"(?:answer|solution|result|option|choice)"
_LINK = r"(?:\b(?:is|be|equals)\b|[:=])"
# Words between noun and verb, without a number, a negation or a doubt: "to this problem".
_BETWEEN = r"(?:(?!not\b|n't|(?:may|might|could)\b)[^\n.,;?!\d]){0,30}?"
_ADVERB = r"\b(?:simply|thus|therefore|indeed|exactly|just|equal to|option|choice)\b"
_FILLER = rf"(?:[\s*:]|{_ADVERB}){{0,20}}"
# A formula or a parenthesis may hold the marks that otherwise end the clause.
_CLAUSE = r"(?P<clause>(?>\$[^$\n]{1,100}\$|\([^()\n]{1,100}\)|[^\n.,;?!]|[.,](?=\d)){1,200})"
# The end of the text ends no sentence: the number before it may be cut.
_END = r"(?P<end>[\n;?!]|[.,](?=\D))"
_PHRASE = re.compile(rf"{_NOUN}{_BETWEEN}{_LINK}{_FILLER}{_CLAUSE}{_END}", re.IGNORECASE)
_LINE_END = r"(?P<clause>[^=\n]{1,200})\n"
_EQUATION = re.compile(rf"(?:[-=]>|(?<![<>!])=|[→⇒]|####){_FILLER}{_LINE_END}", re.IGNORECASE)
_NO_CLAIM = re.compile(
    r"\b(?:if|whether|unless|suppose|assum(?:e|ing)|doubt|unlikely|maybe|perhaps|says|claims"
    r"|(?:false|wrong|incorrect|not true) that|(?:don't|not) think)\b[^\n.?!]*$",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\d|\\[a-z]|^\(?[A-Z]\)?$")
_FIRST_VALUE = re.compile(r"(?:[A-Za-z]\s*=\s*)?(?P<value>\$[^$\n]+\$|\\\(.+?\\\)|\([^()]+\)|\S+)")
# Another value follows, so the first is not the answer: "5 or 6", "5 to 6", "5 + 6".
_GOES_ON = re.compile(r"\s*(?:\bor\b|(?:\b(?:to|plus)\b|[-+*/×·÷^])\s*[\d(\\])")


def states_answer(
    text: str, reference: str, verifier: Verifier | None = None, question: str = ""
) -> bool:
    """Tell whether the last answer that `text` states is the reference answer."""
    text = text.replace(THINK_END, "\n")
    in_words = verifier is not None or not _VALUE.search(reference)
    statements = sorted([*_boxes(text), *_matches(_PHRASE, text, question, in_words)])
    statements = statements or sorted(_matches(_EQUATION, text, question, in_words))
    return bool(statements) and (verifier or equal_answers)(statements[-1][1], reference)


def _boxes(text: str) -> Iterator[tuple[int, str]]:
    r"""Yield position and content of each complete, non-empty `\boxed{}`."""
    starts = [match.start() for match in re.finditer(r"\\boxed\s*\{", text)]
    for start, end in pairwise([*starts, len(text)]):
        content = extract_answer(text[start:end])
        if content:
            yield start, content


def _matches(
    pattern: re.Pattern[str], text: str, question: str, in_words: bool
) -> Iterator[tuple[int, str]]:
    """Yield position and value of each statement: the clause if `in_words`, or its first word."""
    for match in pattern.finditer(text):
        before = text[max(0, match.start() - 40) : match.start()]
        is_question = match.groupdict().get("end") == "?"
        if is_question or _NO_CLAIM.search(before) or match.group().strip() in question:
            continue
        clause = match["clause"].strip()
        first = _FIRST_VALUE.match(clause)
        if in_words:
            yield match.start("clause"), _bare(clause)
        elif first and not _GOES_ON.match(clause, first.end()):
            value = _bare(first["value"])
            is_article = value == "A" and clause[first.end() :].strip()
            if _VALUE.search(value) and not is_article:
                yield match.start("clause"), value


def _bare(value: str) -> str:
    r"""Return a value without Markdown, LaTeX and `x =`; (A) becomes A."""
    value = value.strip("*$€£` ").rstrip("*$`.,:").removesuffix("\\)").removeprefix("\\(").strip()
    value = re.sub(r"^[A-Za-z]\s*=\s*", "", value)
    return value[1:-1] if re.fullmatch(r"\([A-Z]\)", value) else value
