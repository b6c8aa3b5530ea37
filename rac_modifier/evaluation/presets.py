"""The protocol by which reasoning models are compared, per benchmark.

- temperature 0.6, top-p 0.95, at most 32,768 new tokens: DeepSeek-R1 (arXiv 2501.12948,
  section 3), and open-r1's commands.
- answers per problem: open-r1's README (AIME 2024 64, MATH-500 4, GPQA Diamond 8). It has no
  figure for AIME 2025, which gets 64, and for GSM8K, which gets 1.
- the instruction: DeepSeek-R1's README, in the user's turn. For GPQA the letter is asked for in
  the same box, where open-r1 has a last line "Answer: LETTER".
- data sets: those that lighteval reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rac_modifier.problems.held_out import Layout

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
BOXED_LETTER = (
    "Please reason step by step, and put the letter of the right choice, and nothing else, "
    "within \\boxed{}."
)
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class Preset:
    """A dataset on the Hugging Face hub, and how it is asked."""

    source: str
    layout: Layout  # how its rows become problems
    problems: int  # as published
    samples: int  # answers per problem
    split: str
    config: str | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    cap: int = 32768  # new tokens
    access: str = ""  # what a user must do before the dataset can be read

    @property
    def published(self) -> dict[str, Any]:
        """Return the published values, by option of `rac eval`."""
        names = ("source", "samples", "cap", "temperature", "top_p", "problems")
        columns = {name: getattr(self.layout, name) for name in ("column", "answer_column")}
        return columns | {name: getattr(self, name) for name in names}


_ALL = (
    Preset(
        "HuggingFaceH4/aime_2024", Layout("aime24", "problem", "answer", BOXED), 30, 64, "train"
    ),
    Preset("yentinglin/aime_2025", Layout("aime25", "problem", "answer", BOXED), 30, 64, "train"),
    Preset(
        "Idavidrein/gpqa",
        Layout("gpqa-diamond", "Question", "Correct Answer", BOXED_LETTER, "choices", _WRONG),
        198,
        8,
        "train",
        config="gpqa_diamond",
        access="its owners ask to accept their terms on its page, then: hf auth login",
    ),
    Preset(
        "openai/gsm8k",
        Layout("gsm8k", "question", "answer", BOXED, "last line"),
        1319,
        1,
        "test",
        config="main",
    ),
    Preset(
        "HuggingFaceH4/MATH-500", Layout("math-500", "problem", "answer", BOXED), 500, 4, "test"
    ),
)
PRESETS = {preset.layout.task: preset for preset in _ALL}
