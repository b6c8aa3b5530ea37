"""From settings to the calibration loader: collect the traces, mix, record the mixture."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, generic_token_sequences, mix
from rac_modifier.calibration.trace_pool import TracePool, collect_for_calibration
from rac_modifier.distributed.processes import ALONE, Processes
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.generate import render_question
from rac_modifier.settings.calibration import CalibrationSettings, TraceSettings, part_tokens
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.traces.records import Trace

_MANY_UNFINISHED = 0.5  # of the traces: then a warning says so


@dataclass(frozen=True)
class CalibrationSet:
    """The loader, and by part of the mixture the pool of its traces and the prompt settings.

    Only the first process has pools; the others get the `received` traces.
    """

    loader: CalibrationLoader
    counts: Mapping[str, Any] = field(default_factory=dict)
    pools: Mapping[str, TracePool] = field(default_factory=dict)
    prompts: Mapping[str, PromptSettings] = field(default_factory=dict)
    received: tuple[Trace, ...] = ()

    @property
    def held_out(self) -> tuple[Trace, ...]:
        """Return the held-out traces of all parts."""
        return tuple(trace for pool in self.pools.values() for trace in pool.held_out)

    @property
    def reserved(self) -> tuple[Trace, ...]:
        """Return the traces that are reserved for training after pruning, parts in turn."""
        return (*_in_turn([pool.reserved for pool in self.pools.values()]), *self.received)

    def identity(self) -> dict[str, Any]:
        """Return what identifies the set: its hash, and the hash of each trace store."""
        stores = {
            f"{key}: {pool.store.path}": f"sha256 {pool.store.sha256()[:12]}"
            for key, pool in self.pools.items()
        }
        return {"calibration set": self.loader.sha256(), "trace stores": stores}

    def as_dict(self) -> dict[str, Any]:
        """Return counts, prompt settings and trace stores for the run record."""
        return {
            "calibration": self.counts,
            "prompts": {part: prompt.model_dump() for part, prompt in self.prompts.items()},
            "trace_stores": {key: _store_record(pool) for key, pool in self.pools.items()},
        }


def _in_turn(parts: Iterable[Sequence[Trace]]) -> Iterator[Trace]:
    """Merge traces, so that a beginning holds the same share of the tokens of each part."""
    placed: list[tuple[float, Trace]] = []
    for traces in parts:
        tokens = [trace.tokens for trace in traces]
        ends = (end / sum(tokens) for end in accumulate(tokens))
        placed += zip(ends, traces, strict=True)
    return (trace for _, trace in sorted(placed, key=lambda pair: pair[0]))


def build_calibration_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    reserved_tokens: int = 0,
    processes: Processes = ALONE,
) -> CalibrationSet:
    """Sample the traces that are missing, and mix the set (RacError: as `collect_traces`, `mix`).

    `CalibrationSet.reserved` has traces of about `reserved_tokens` more. The first of `processes`
    samples, and sends the set to the others.
    """
    if not processes.is_first:
        return _received(processes.from_first(), calibration)
    by_part: dict[str, Iterable[CalibrationSequence]] = {}
    prompts: dict[str, PromptSettings] = {}
    kept_out: set[tuple[int, ...]] = set()  # prompts; complete when the first is drawn
    for part in calibration.parts("prompts"):
        settings = traces.named(part.name)
        by_part[part.key] = _prompts(tokenizer, settings, kept_out)
        prompts[part.key] = PromptSettings.of(settings.sampling)
    if calibration.parts("generic"):
        ids = generic_token_sequences(tokenizer, calibration.generic, calibration.seed)
        by_part["generic"] = (CalibrationSequence(tuple(i), len(i), "generic") for i in ids)
    pools: dict[str, TracePool] = {}
    if calibration.parts("traces"):
        pools = collect_for_calibration(model, tokenizer, traces, calibration, reserved_tokens)
    kept_out |= {t.prompt_ids for p in pools.values() for t in (*p.held_out, *p.reserved)}
    budgets = part_tokens(calibration.mixture, calibration.tokens)
    for key, pool in pools.items():
        by_part[key] = pool.draw(key, budgets[key])
        prompts[key] = PromptSettings.of(pool.store.header.sampling)
    sequences, counts = mix(by_part, calibration)
    logger.info(_described(counts))
    unfinished = counts["unfinished_traces"]
    if unfinished >= _MANY_UNFINISHED * sum(s.kind == "traces" for s in sequences) > 0:
        logger.warning(
            f"{unfinished:,} traces were cut at traces.sampling.max_new_tokens: calibration sees "
            "few endings of answers; raise it"
        )
    loader = CalibrationLoader.of(sequences, calibration)
    calibration_set = CalibrationSet(loader, counts, pools, prompts)
    if processes.count > 1:
        processes.from_first(_sent(calibration_set))
    return calibration_set


def _described(counts: Mapping[str, Any]) -> str:
    """Describe the counts of `mix` in a sentence for the log."""
    return (
        f"calibrating on {counts['tokens']:,} tokens in {counts['sequences']:,} sequences: "
        f"{counts['trace_tokens']:,} of chain of thought, {counts['prompt_tokens']:,} of prompts, "
        f"{counts['generic_tokens']:,} of generic text; {counts['unfinished_traces']:,} traces hit "
        f"the sampling cap, {counts['truncated_sequences']:,} sequences were cut to fit"
    )


def _sent(calibration_set: CalibrationSet) -> dict[str, Any]:
    """Return what the other processes need of the first one's set, as JSON."""
    loader = calibration_set.loader
    return {
        "sequences": [asdict(sequence) for sequence in loader.sequences],
        "counts": dict(calibration_set.counts),
        "reserved": [asdict(trace) for trace in calibration_set.reserved],
    }


def _received(sent: dict[str, Any], settings: CalibrationSettings) -> CalibrationSet:
    """Reverse `_sent`."""
    sequences = [
        CalibrationSequence(**{**fields, "ids": tuple(fields["ids"])})
        for fields in sent["sequences"]
    ]
    loader = CalibrationLoader.of(sequences, settings)
    received = tuple(map(Trace.of, sent["reserved"]))
    return CalibrationSet(loader, sent["counts"], received=received)


def _prompts(
    tokenizer: PreTrainedTokenizerBase, traces: TraceSettings, kept_out: Container[tuple[int, ...]]
) -> Iterator[CalibrationSequence]:
    for problem in load_problems(traces.problems, traces.sampling.seed):
        ids = tuple(render_question(tokenizer, problem.question, traces.sampling))
        if ids not in kept_out:
            yield CalibrationSequence(ids, len(ids), "prompts")


def _store_record(pool: TracePool) -> dict[str, Any]:
    header = pool.store.header
    return {
        "path": str(pool.store.path),
        "sha256": pool.store.sha256(),
        "model": header.model,
        "engine": header.engine.kind,
        "chat_template": header.chat_template,
        "selection": pool.selection.as_dict(),
    }
