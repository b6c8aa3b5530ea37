"""Ask a model a list of problems and measure its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, Row, summarise
from rac_modifier.evaluation.stopping import ending_of
from rac_modifier.problems.answer_checker import check_installed
from rac_modifier.problems.answers import Verifier, is_correct
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
from rac_modifier.sampling.generate import generate as generate_in_process
from rac_modifier.sampling.prompts import render_prompt
from rac_modifier.sampling.thinking import thinking_length
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.sampling import SamplingSettings

# At a temperature above 0; the reference evaluation has 0.6 and 0.95 (arXiv 2509.12464).
TOP_P = 0.95


class Generate(Protocol):
    """Complete prompts as `sampling.generate.generate` does; `keys` name them for seeding."""

    def __call__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: list[list[int]],
        settings: SamplingSettings,
        keys: list[str],
    ) -> list[Generation]:
        """Return a generation per prompt, in order."""
        ...


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    label: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = TOP_P,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
    verifiers: Mapping[str, Verifier] | None = None,
    render: Callable[[Any, str], list[int]] = render_prompt,
    generate: Generate = generate_in_process,
) -> EvalResult:
    """Measure zero-shot accuracy, thinking length, unfinished share and speed over `problems`.

    Args:
        model: a transformers causal LM, or what `generate` accepts.
        tokenizer: the model's tokenizer.
        problems: each with an answer; ids distinct.
        label: the result's name in tables.
        max_new_tokens: the cap. An answer cut off there is unfinished, and right only if it already
            holds the answer.
        temperature: 0 is greedy, which ignores `top_p` and `seed`.
        top_p: sample among the most likely tokens that hold this share.
        batch_size: prompts per call of `generate`.
        seed: of the sampling.
        progress: show a progress bar.
        verifiers: by task name, a function that compares answers instead of math-verify.
        render: from tokenizer and question to prompt ids; default: the chat template.
        generate: completes one batch per call; default: the model in this process.

    Raises:
        RacError: no problems, a problem without an answer, an id twice, a setting out of range, or
            math-verify is not installed.
    """
    check_problems(problems, verifiers or {})
    # nothing comes from a model's generation_config: all models sample alike
    values = {"temperature": temperature, "top_p": top_p, "top_k": 0, "seed": seed}
    values |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    settings = check_settings(SamplingSettings, values, "the evaluation")
    prompts = [render(tokenizer, problem.question) for problem in problems]
    # longest first: prompts of like length share a batch, and one too large for memory fails early
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]), reverse=True)
    generations: dict[int, Generation] = {}
    started = time.monotonic()
    for batch in _chunks(order, batch_size, label if progress else None):
        keys = [problems[i].id for i in batch]
        outputs = generate(model, tokenizer, [prompts[i] for i in batch], settings, keys)
        generations.update(zip(batch, outputs, strict=True))
    seconds = time.monotonic() - started

    rows = [
        row_of(
            tokenizer,
            problem,
            generations[i],
            (verifiers or {}).get(problem.task or ""),
        )
        for i, problem in enumerate(problems)
    ]
    return summarise(
        rows, label=label, seconds=seconds, cap=max_new_tokens, temperature=temperature, seed=seed
    )


def check_problems(problems: Sequence[Problem], verifiers: Mapping[str, Verifier]) -> None:
    """Check that problems can be graded; `verifiers` replace math-verify for their tasks.

    Raises:
        RacError: no problems, one without an answer, an id twice, or math-verify is not installed.
    """
    if not problems:
        raise RacError(
            "no problems to evaluate on; give at least one (check the problem source and its limit)"
        )
    without = [p.id for p in problems if p.answer is None or not p.answer.strip()]
    if without:
        raise RacError(
            f"{len(without)} of {len(problems)} problems have no answer to check against (first: "
            f"{without[0]!r}); name the column that holds the answers (answer_column), or leave these "
            "problems out"
        )
    seen: set[str] = set()
    for p in problems:
        if p.id in seen:
            raise RacError(f"problem id {p.id!r} appears twice; give each problem once")
        seen.add(p.id)
    if any((p.task or "") not in verifiers for p in problems):
        check_installed("mathematics")


def _chunks(order: list[int], size: int, label: str | None) -> Iterator[list[int]]:
    """Cut `order` into batches, with a progress bar if there is a label."""
    with tqdm(
        total=len(order), desc=label, unit="problem", disable=True if label is None else None
    ) as bar:
        for start in range(0, len(order), size):
            yield order[start : start + size]
            bar.update(min(size, len(order) - start))


def row_of(
    tokenizer: Any,
    problem: Problem,
    generation: Generation,
    verifier: Verifier | None,
    sample: int = 0,
) -> Row:
    """Check an answer and classify its ending."""
    assert problem.answer is not None
    # The thinking tags of R1 and Qwen3 are ordinary tokens, so they stay in the text.
    text = tokenizer.decode(list(generation.ids), skip_special_tokens=True)
    correct = is_correct(text, problem.answer, verifier)
    ending = ending_of(
        text,
        problem.answer,
        correct=correct,
        finish=generation.finish_reason,
        tokens=len(generation.ids),
        thinking_tokens=thinking_length(tokenizer, generation.ids),
        ids=generation.ids,
        question=problem.question,
        verifier=verifier,
    )
    return Row(problem.id, problem.task, correct, text, sample, ending)
