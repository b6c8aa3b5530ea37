"""Choose traces of a store, by their answers too, and describe what a store holds."""

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.answer_checker import WORKERS, check_answer
from rac_modifier.problems.answers import completion_text, equal_answers, extract_answer
from rac_modifier.problems.source import gym_item
from rac_modifier.sampling.completions_api import shown
from rac_modifier.settings.calibration import SelectSettings
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.recipe_files import parse_yaml
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.traces.records import StoreHeader, Trace
from rac_modifier.traces.store import FailedProblem, TraceStore

_TOGETHER = 256  # traces in memory while their answers are checked


class Judge:
    """Judges traces and caches each verdict; an answer that takes too long to check is wrong."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, header: StoreHeader):
        self._tokenizer, self._header = tokenizer, header
        self._verdicts: dict[str, bool] = {}

    def __call__(self, traces: Iterable[Trace]) -> Iterator[tuple[Trace, bool]]:
        """Yield each trace with its verdict, in order."""
        remaining = iter(traces)
        with ThreadPoolExecutor(WORKERS) as pool:
            while batch := list(islice(remaining, _TOGETHER)):
                for trace, right in zip(batch, pool.map(self._verdict, batch), strict=True):
                    self._verdicts[trace.id] = right
                    yield trace, right

    def _verdict(self, trace: Trace) -> bool:
        if trace.id in self._verdicts:
            return self._verdicts[trace.id]
        if trace.answer is None:
            raise RacError(
                f"trace {trace.id!r} has no reference answer: name the column of the answers "
                "(problems.answer_column) in a new store, or select without answers"
            )
        answer = extract_answer(completion_text(self._tokenizer, trace.completion_ids))
        if answer is None:
            return False
        if item := gym_item(self._header.problems, self._header.sampling.seed, trace.problem_id):
            return check_answer("reasoning-gym", answer, *item)
        return equal_answers(answer, trace.answer)


class Selection:
    """Filters traces by settings, and counts the dropped traces by reason."""

    def __init__(self, settings: SelectSettings):
        self.settings = settings
        self.total = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()

    def keep(self, traces: Iterable[Trace], judge: Judge) -> Iterator[Trace]:
        """Yield the selected traces in order; answers are judged only if the settings need it."""
        judged: Iterable[tuple[Trace, bool]] = ((trace, True) for trace in traces)
        if self.settings.answers == "correct":
            judged = judge(traces)
        longest = self.settings.max_tokens
        for trace, right in judged:
            self.total += 1
            if self.settings.finished and trace.finish_reason != "stop":
                self.dropped["unfinished"] += 1
            elif longest is not None and len(trace.completion_ids) > longest:
                self.dropped["too long"] += 1
            elif not right:
                self.dropped["wrong"] += 1
            else:
                self.kept += 1
                yield trace

    def describe(self) -> str:
        """Describe the counts, for example "kept 812 of 1,024: 150 wrong, 62 unfinished"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"kept {self.kept:,} of {self.total:,}" + (f": {reasons}" if reasons else "")

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Return the counts for the run record."""
        return {"kept": self.kept, "of": self.total, "dropped": dict(self.dropped.most_common())}


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
