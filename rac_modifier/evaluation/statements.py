r"""The answer that a text states last, in English.

A statement is `\boxed{X}`, or "the answer is X" in a sentence that ends. A text without either may
state its answer as `= X` or `-> X` at the end of a line. Other numbers do not count.
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from rac_modifier.problems.answers import THINK_END, Verifier, equal_answers, extract_answer

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
