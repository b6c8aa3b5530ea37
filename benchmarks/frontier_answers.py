"""The dense model's answers in the folder of a frontier, on which its rows and those of other benchmarks are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.grid import DENSE
from rac_modifier.settings.prompt import PromptSettings
from rac_modifier.settings.sampling import SamplingSettings


def answers_in(folder: FrontierFolder, tokenizer: object) -> list[TokenSequence]:
    """The dense model's answers, after their prompts."""
    evaluation = folder.about["evaluation"]
    sampling = SamplingSettings(**PromptSettings(**folder.about["prompt"]).model_dump())
    problems = held_out_problems(
        evaluation["source"], evaluation["problems"], seed=evaluation["seed"]
    )
    prompts = [
        tuple(render_question(tokenizer, problem.question, sampling)) for problem in problems
    ]
    traces = folder.traces(DENSE)
    return [
        ((*prompt, *trace["ids"]), len(prompt))
        for prompt, trace in zip(prompts, traces, strict=True)
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a benchmark has appended to a file so far; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
