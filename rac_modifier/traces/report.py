"""A trace store described as text, for `rac traces inspect`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.strict_yaml import parse_yaml
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.failures import read_failures
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Selection, as_used, repeated_tail, select
from rac_modifier.traces.store import TraceStore

_BAR = 40


@dataclass
class Endings:
    """How long traces are, why they ended, and how many were cut while they repeated themselves."""

    lengths: Counter[int] = field(
        default_factory=Counter
    )  # completion tokens, by lower bounds of a histogram's bars
    ended_by: Counter[str] = field(default_factory=Counter)
    repeating: int = 0  # traces
    repeated_tokens: int = 0


def count_endings(traces: Iterable[Trace]) -> Endings:
    """The endings of these traces."""
    found = Endings()
    for trace in traces:
        found.lengths[_bucket(len(trace.completion_ids))] += 1
        found.ended_by[trace.finish_reason] += 1
        tail = repeated_tail(trace.completion_ids, trace.finish_reason)
        found.repeating += tail > 0
        found.repeated_tokens += tail
    return found


def describe_store(store: TraceStore) -> str:
    """The model, problems and settings of a store, its counts, why its traces ended, and a histogram of their lengths."""
    header, counts = store.header, store.counts
    sampling = header.sampling
    prompt = (
        f"{sampling.template} template{f' {header.chat_template}' if header.chat_template else ''}"
    )
    if sampling.template == "chat":
        prompt += f", generation prompt added, thinking {'on' if sampling.thinking else 'off'}"
        prompt += (
            f", system prompt {sampling.system_prompt!r}"
            if sampling.system_prompt
            else ", no system prompt"
        )
    lines = [
        f"model       {header.model} (fingerprint {header.fingerprint[:12]})",
        f"problems    {header.problems.model_dump_json(exclude_none=True)}",
        f"prompt      {prompt}",
        f"sampling    {sampling.model_dump_json(exclude_none=True, exclude={'template', 'thinking', 'system_prompt'})}",
        f"engine      {header.engine.kind} {header.engine.served_model or ''}".rstrip(),
        f"traces      {counts.traces:,} ({counts.finished:,} finished), {counts.prompt_tokens:,} prompt and "
        f"{counts.completion_tokens:,} completion tokens",
    ]
    if failed := len(read_failures(store.path)):
        lines.append(
            f"failed      {failed:,} problems, skipped (set traces.retry_failed to try them again)"
        )
    endings = count_endings(store)
    if endings.ended_by:
        lines.append(
            "ended by    "
            + ", ".join(f"{reason} {n:,}" for reason, n in endings.ended_by.most_common())
        )
        if endings.repeating:
            lines.append(
                f"repeating   {endings.repeating:,} that were cut end in repetitions, {endings.repeated_tokens:,} tokens"
            )
        lines += ["completion tokens", *_histogram(endings.lengths)]
    return "\n".join(lines)


def describe_verified(
    store: TraceStore, tokenizer: Any, verify: bool, settings: SelectSettings | None
) -> str:
    """How many answers are right, with the time of checking them; and what a selection keeps."""
    found, lines = verified_figures(store, tokenizer, verify, settings), []
    if "right" in found:
        lines.append(
            f"verified    {found['right']:,} of {len(store):,} right ({found['right'] / len(store):.1%}), "
            f"{found['ms_per_trace']:.2g} ms per trace"
        )
    if "selection" in found:
        lines.append(f"selection   {found['selection']}; {found['selected_tokens']:,} tokens")
    return "\n".join(lines)


def verified_figures(
    store: TraceStore, tokenizer: Any, verify: bool, settings: SelectSettings | None
) -> dict[str, Any]:
    """What `describe_verified` prints, as numbers: only what was requested."""
    judge, found = Judge(tokenizer, store.header), dict[str, Any]()
    if verify and len(store):
        started = time.perf_counter()
        found["right"] = sum(right for _, right in judge(store))
        found["ms_per_trace"] = 1000 * (time.perf_counter() - started) / len(store)
    if settings is not None:
        selection = Selection(settings)
        found["selected_tokens"] = sum(
            t.tokens for t in select(as_used(store, settings), selection, judge)
        )
        found |= {"selected": selection.kept, "selection": selection.describe()}
    return found


def read_select(text: str | None) -> SelectSettings | None:
    """The settings of a selection, written as in a recipe, in one line of YAML.

    Raises:
        RacError: the text is not a selection.
    """
    if text is None:
        return None
    message = (
        f"--select {text[:100]!r} is not a selection; write it like "
        "'{answers: correct, finished: true}'"
    )
    values = parse_yaml(text, message)
    if not isinstance(values, dict):
        raise RacError(message)
    return check_settings(SelectSettings, values, f"--select {text!r}")


def _bucket(length: int) -> int:
    """The lower bound of the bar that counts this length: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    low = 1 << max(length.bit_length() - 1, 0)
    return low + low // 2 if low >= 2 and length >= low + low // 2 else low


def _histogram(lengths: Counter[int]) -> list[str]:
    most = max(lengths.values())
    width = len(f"{max(lengths):,}")
    return [
        f"  from {low:>{width},} {count:>8,} {'#' * max(1, round(_BAR * count / most))}"
        for low, count in sorted(lengths.items())
    ]
