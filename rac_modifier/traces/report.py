"""Describe a trace store, for `rac traces inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.recipe_files import parse_yaml
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Judge, Selection, repeated_tail, select, without_repeats
from rac_modifier.traces.store import TraceStore, read_failures

_BAR = 40
_PROMPT = {"template", "thinking", "system_prompt"}


@dataclass
class Endings:
    """Traces by completion tokens (lower bounds of a histogram's bars) and by finish reason.

    `repeating` traces were truncated while they repeated themselves, by `repeated_tokens`.
    """

    lengths: Counter[int] = field(default_factory=Counter)
    ended_by: Counter[str] = field(default_factory=Counter)
    repeating: int = 0
    repeated_tokens: int = 0


def count_endings(traces: Iterable[Trace]) -> Endings:
    """Count the endings of traces."""
    endings = Endings()
    for trace in traces:
        endings.lengths[_bucket(len(trace.completion_ids))] += 1
        endings.ended_by[trace.finish_reason] += 1
        tail = repeated_tail(trace.completion_ids, trace.finish_reason)
        endings.repeating += tail > 0
        endings.repeated_tokens += tail
    return endings


def describe_store(store: TraceStore) -> str:
    """Describe model, problems, settings, counts, endings and lengths of a store."""
    header, counts, sampling = store.header, store.counts, store.header.sampling
    template = f"template {header.chat_template}" if header.chat_template else "template"
    prompt = PromptSettings.of(sampling).describe().replace("template", template, 1)
    lines = [
        f"model       {header.model} (fingerprint {header.fingerprint[:12]})",
        f"problems    {header.problems.model_dump_json(exclude_none=True)}",
        f"prompt      {prompt}",
        f"sampling    {sampling.model_dump_json(exclude_none=True, exclude=_PROMPT)}",
        f"engine      {header.engine.kind} {header.engine.served_model or ''}".rstrip(),
        f"traces      {counts.traces:,} ({counts.finished:,} finished), {counts.prompt_tokens:,} "
        f"prompt and {counts.completion_tokens:,} completion tokens",
    ]
    if failed := len(read_failures(store.path)):
        again = "remove the .failed.jsonl file to try them again"
        lines.append(f"failed      {failed:,} problems, skipped ({again})")
    endings = count_endings(store)
    if endings.ended_by:
        ended_by = ", ".join(f"{reason} {n:,}" for reason, n in endings.ended_by.most_common())
        lines.append(f"ended by    {ended_by}")
        if endings.repeating:
            lines.append(
                f"repeating   {endings.repeating:,} that were cut end in repetitions, "
                f"{endings.repeated_tokens:,} tokens"
            )
        lines += ["completion tokens", *_histogram(endings.lengths)]
    return "\n".join(lines)


def verified_figures(
    store: TraceStore, tokenizer: Any, verify: bool, settings: SelectSettings | None
) -> dict[str, Any]:
    """Count right answers if `verify`, and what a selection keeps."""
    judge, figures = Judge(tokenizer, store.header), dict[str, Any]()
    if verify and len(store):
        figures["right"] = sum(right for _, right in judge(store))
    if settings is not None:
        selection = Selection(settings)
        traces = select(map(without_repeats, store), selection, judge)
        figures["selected_tokens"] = sum(trace.tokens for trace in traces)
        figures |= {"selected": selection.kept, "selection": selection.describe()}
    return figures


def describe_verified(figures: dict[str, Any], traces: int) -> str:
    """Describe `verified_figures` of a store with this number of traces."""
    lines = []
    if "right" in figures:
        right = figures["right"]
        lines.append(f"verified    {right:,} of {traces:,} right ({right / traces:.1%})")
    if "selection" in figures:
        lines.append(f"selection   {figures['selection']}; {figures['selected_tokens']:,} tokens")
    return "\n".join(lines)


def read_select(text: str | None) -> SelectSettings | None:
    """Read the settings of a selection, written as in a recipe, from a line of YAML."""
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
    """Return the lower bound of a length's bar: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    low = 1 << max(length.bit_length() - 1, 0)
    return low + low // 2 if low >= 2 and length >= low + low // 2 else low


def _histogram(lengths: Counter[int]) -> list[str]:
    most = max(lengths.values())
    width = len(f"{max(lengths):,}")
    return [
        f"  from {low:>{width},} {count:>8,} {'#' * max(1, round(_BAR * count / most))}"
        for low, count in sorted(lengths.items())
    ]
