"""The protocol by which reasoning models are compared, per benchmark: problems, instruction, answers per problem, sampling, cap.

Where the figures come from:

- temperature 0.6, top-p 0.95, at most 32,768 new tokens: DeepSeek-R1 (arXiv 2501.12948, section 3; README, "Evaluation
  Results"), and open-r1's commands for all its benchmarks.
- answers per problem: open-r1's README, "Reproducing DeepSeek's evaluation results": AIME 2024 64, MATH-500 4, GPQA Diamond 8.
  It has no figure for AIME 2025, which gets 64 as AIME 2024 has as many problems. Neither has GSM8K: its 1,319 problems are
  enough for one answer each.
- the instruction: the directive of DeepSeek-R1's README ("Usage Recommendations", 3), in the user's turn and without a system
  prompt (2). For GPQA ours asks for the letter in the same box; open-r1 asks for a last line "Answer: LETTER", so figures of
  GPQA can differ by what a model makes of the instruction.
- data sets: those that lighteval's tasks aime24, aime25, math_500, gpqa:diamond and gsm8k read.
"""

from __future__ import annotations

from dataclasses import dataclass

from rac_modifier.errors import RacError
from rac_modifier.problems.benchmarks import Layout

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
BOXED_LETTER = "Please reason step by step, and put the letter of the right choice, and nothing else, within \\boxed{}."
_WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True)
class Preset:
    """One benchmark.

    Attributes:
        source, config, split: the dataset on the Hugging Face hub.
        layout: how its rows become problems.
        problems: how many it has, as published.
        samples: answers per problem.
        temperature, top_p, cap: of the sampling; the cap is in new tokens.
        access: what a user must do before the dataset can be read; empty where nothing.
    """

    source: str
    layout: Layout
    problems: int
    samples: int
    split: str
    config: str | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    cap: int = 32768
    access: str = ""

    @property
    def name(self) -> str:
        """As users know it."""
        return self.layout.task


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
PRESETS = {preset.name: preset for preset in _ALL}


def preset_of(name: str) -> Preset:
    """The preset of that name.

    Raises:
        RacError: there is none.
    """
    if name not in PRESETS:
        raise RacError(f"no preset {name!r}; use one of {', '.join(PRESETS)}")
    return PRESETS[name]
