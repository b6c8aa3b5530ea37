"""Describe a trace store, for `rac traces inspect`."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import shown
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.recipe_files import parse_yaml
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Judge, Selection
from rac_modifier.traces.store import FailedProblem, TraceStore

_PROMPT = {"template", "thinking", "system_prompt"}


def count_endings(traces: Iterable[Trace]) -> dict[str, Any]:
    """Count by finish reason; lengths in tokens; truncated traces that repeat themselves."""
    lengths, tails = [], []
    ended_by: Counter[str] = Counter()
    for trace in traces:
        lengths.append(len(trace.completion_ids))
        tails.append(trace.repeated_tokens)
        ended_by[trace.finish_reason] += 1
    return {
        "ended_by": ended_by,
        "median": sorted(lengths)[len(lengths) // 2] if lengths else 0,
        "longest": max(lengths, default=0),
        "repeating": sum(tail > 0 for tail in tails),
        "repeated_tokens": sum(tails),
    }


def describe_store(store: TraceStore) -> str:
    """Describe a store in lines of text."""
    header, counts, sampling = store.header, store.counts, store.header.sampling
    template = f"template {header.chat_template}" if header.chat_template else "template"
    prompt = PromptSettings.of(sampling).describe().replace("template", template, 1)
    lines = [
        f"model       {shown(header.model)} (fingerprint {header.fingerprint[:12]})",
        f"problems    {header.problems.model_dump_json(exclude_none=True)}",
        f"prompt      {prompt}",
        f"sampling    {sampling.model_dump_json(exclude_none=True, exclude=_PROMPT)}",
        f"engine      {header.engine.kind} {shown(header.engine.served_model or '')}".rstrip(),
        f"traces      {counts.traces:,} ({counts.finished:,} finished), {counts.prompt_tokens:,} "
        f"prompt and {counts.completion_tokens:,} completion tokens",
    ]
    if failed := len(FailedProblem.read(store.path)):
        again = "remove the .failed.jsonl file to try them again"
        lines.append(f"failed      {failed:,} problems, skipped ({again})")
    endings = count_endings(store)
    if ended_by := endings["ended_by"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in ended_by.most_common())
        lines.append(f"ended by    {reasons}")
        lines.append(
            f"completion  {endings['median']:,} tokens (median), {endings['longest']:,} (longest)"
        )
    if endings["repeating"]:
        lines.append(
            f"repeating   {endings['repeating']:,} that were cut end in repetitions, "
            f"{endings['repeated_tokens']:,} tokens"
        )
    return "\n".join(lines)


def selected_figures(store: TraceStore, tokenizer: Any, settings: SelectSettings) -> dict[str, Any]:
    """Count the traces and tokens that a selection keeps, and describe what it drops."""
    selection = Selection(settings)
    traces = selection.keep((t.without_repeats() for t in store), Judge(tokenizer, store.header))
    tokens = sum(trace.tokens for trace in traces)
    description = selection.describe()
    return {"selected": selection.kept, "selected_tokens": tokens, "selection": description}


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
