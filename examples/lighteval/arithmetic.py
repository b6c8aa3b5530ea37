"""A task for lighteval: the held-out arithmetic problems that `rac eval` asks.

Write them first, in the environment of rac_modifier: `python
examples/lighteval/arithmetic.py problems 200` makes problems/test.jsonl. lighteval, in an
environment of its own, reads the folder that RAC_PROBLEMS names (docs/harnesses.md).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

_BOX = re.compile(r"\\boxed\{([^}]*)\}")


def write_problems(folder: str, count: int = 200) -> None:
    """The split "test" as JSON lines with question and answer."""
    import json

    from rac_modifier.problems.held_out import held_out_problems

    rows = [
        {"question": p.question, "answer": p.answer}
        for p in held_out_problems("arithmetic", count, 0)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def last_box(text: str) -> str:
    """What the last box of an answer holds; empty where there is none."""
    boxes = _BOX.findall(text)
    return boxes[-1].strip() if boxes else ""


def task() -> Any:
    """The task, once lighteval is there."""
    from lighteval.metrics.metrics_sample import ExactMatches
    from lighteval.metrics.utils.metric_utils import SampleLevelMetric
    from lighteval.tasks.lighteval_task import LightevalTaskConfig
    from lighteval.tasks.requests import Doc, SamplingMethod

    def prompt(line: dict[str, Any], task_name: str | None = None) -> Doc:
        return Doc(
            task_name=task_name, query=line["question"], choices=[str(line["answer"])], gold_index=0
        )

    boxed = SampleLevelMetric(
        metric_name="boxed",
        sample_level_fn=ExactMatches(normalize_pred=last_box),
        category=SamplingMethod.GENERATIVE,
        corpus_level_fn=fmean,  # lighteval pickles it
        higher_is_better=True,
    )
    return LightevalTaskConfig(
        name="rac_arithmetic",
        prompt_function=prompt,
        hf_repo=os.environ.get("RAC_PROBLEMS", "problems"),  # a folder with test.jsonl
        hf_subset=None,
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        metrics=[boxed],
        generation_size=512,
    )


if __name__ == "__main__":
    write_problems(sys.argv[1], *map(int, sys.argv[2:]))
else:
    TASKS_TABLE = [task()]
