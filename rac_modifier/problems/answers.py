"""The end of the thinking and the final answer in a completion, and whether the answer is right."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

THINK_END = "</think>"
_END_OF_PROMPT = 16  # tokens that hold the tag and the white space behind it
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]+")
# Two other letters may be a product: xy = yx.
_WORD = re.compile(r"[A-Za-z]{3,}|no|on", re.IGNORECASE)
# What math-verify does not read: a plural behind a number, 1 1/2, the space between thousands,
# a currency other than the dollar, 1e-5, and what follows the answer.
_UNIT = re.compile(r"(?<=\d)\s+[A-Za-z]{3,}s\Z")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)\Z")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;: ]|~|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_CURRENCY = re.compile(r"[€£¥](?=\s*\d)|(?<=\d)\s*[€£¥]")
_EXPONENT = re.compile(r"([+-]?\d*\.?\d+)[eE]([+-]?\d+)\Z")
_TAIL = re.compile(r"(?:(?<!\.)[.。]|°)\s*\Z")
_STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")

Verifier = Callable[[str, str], bool]
"""Tells whether the model's answer is right, given the problem's reference answer."""


def completion_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode a completion without special tokens, but with the first `</think>`."""
    tag = tokenizer.encode(THINK_END, add_special_tokens=False)
    parts = [list(ids)]
    if len(tag) == 1 and tag[0] in tokenizer.all_special_ids and tag[0] in ids:
        end = ids.index(tag[0])
        parts = [list(ids[:end]), list(ids[end + 1 :])]
    return THINK_END.join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)


def thinking_length(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> int:
    """Count a completion's tokens up to and including `</think>`; all tokens without it.

    0 where the prompt ends in `</think>`, as templates write it with thinking off.
    """
    if tokenizer.decode(list(prompt_ids[-_END_OF_PROMPT:])).rstrip().endswith(THINK_END):
        return 0
    tag = tokenizer.encode(THINK_END, add_special_tokens=False)
    if len(tag) == 1:
        return ids.index(tag[0]) + 1 if tag[0] in ids else len(ids)
    low, high = 0, len(ids)
    while low < high:  # the shortest prefix whose text holds the tag
        middle = (low + high) // 2
        ended = THINK_END in tokenizer.decode(list(ids[:middle]))
        low, high = (low, middle) if ended else (middle + 1, high)
    return low


def extract_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` that is not empty after the thinking, or None.

    Thinking ends at the first `</think>`; a text without that is searched as a whole.
    Escaped braces (`\{`) do not count, and of nested boxes the inner one is the answer.

    >>> extract_answer(r"so \boxed{3}?</think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    _, tag, after = text.partition(THINK_END)
    answer_text = after if tag else text
    open_braces: list[tuple[bool, int]] = []  # is it a box, where its content starts
    last: tuple[int, int] | None = None
    for match in _BOX_OR_BRACE.finditer(answer_text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_braces.append((token != "{", match.end()))
        elif token == "}" and open_braces:
            is_box, start = open_braces.pop()
            is_later = is_box and (last is None or start > last[0])
            if is_later and answer_text[start : match.start()].strip():
                last = (start, match.start())
    return None if last is None else answer_text[slice(*last)].strip()


def is_correct(text: str, answer: str, verifier: Verifier | None = None) -> bool:
    """Return whether a completion's final answer is right; an unreadable one is wrong."""
    extracted = extract_answer(text)
    return extracted is not None and bool((verifier or equal_answers)(extracted, answer))


def equal_answers(answer: str, reference: str) -> bool:
    """Tell whether answers are equal as text, words, integers of any length, or as mathematics."""
    answer, reference = _bare(answer), _bare(reference)
    if not answer or not reference:
        return False
    text, other_text = (_STYLE.sub(r"\1", value).strip() for value in (answer, reference))
    if text == other_text:
        return True
    if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(other_text):
        return Decimal(text) == Decimal(other_text)  # int refuses more than 4,300 digits
    if _WORD.fullmatch(text) and _WORD.fullmatch(other_text):
        word, other = text.casefold(), other_text.casefold()
        if sorted(word) == sorted(other):  # math-verify multiplies the letters
            return word == other
    if not (_UNIT.search(answer) and _UNIT.search(reference)):
        answer, reference = _UNIT.sub("", answer), _UNIT.sub("", reference)
    answer, reference = (_MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", x) for x in (answer, reference))
    answer, reference = (_scientific(x) for x in (answer, reference))
    from rac_modifier.problems import answer_checker  # loguru: a serving environment may lack it

    return answer_checker.check_answer("mathematics", answer, reference)


def _scientific(text: str) -> str:
    """Return 1.5e-5 as a product, other text as it is: math-verify reads e as Euler's number."""
    number = _EXPONENT.match(text)
    return rf"{number[1]} \times 10^{{{number[2]}}}" if number else text


def _bare(answer: str) -> str:
    r"""Remove `\boxed{}` or `$` around an answer, a period, € or ° behind it, `\,` in 1\,234."""
    boxed = extract_answer(answer)
    bare = _TAIL.sub("", (answer if boxed is None else boxed).strip())
    bare = bare.strip("$").strip() if bare.startswith("$") and bare.endswith("$") else bare
    return _THOUSANDS.sub("", _CURRENCY.sub("", _TAIL.sub("", bare)).strip())
