"""From settings to the calibration loader: collect the traces, mix, say what was chosen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.calibration.batches import CalibrationLoader
from rac_modifier.calibration.generic import generic_token_sequences
from rac_modifier.calibration.held_out import split
from rac_modifier.calibration.mixture import (
    CalibrationSequence,
    generic_sequence,
    mix,
    prompt_sequence,
    require_traces,
    trace_sequence,
)
from rac_modifier.calibration.settings import CalibrationSettings, TraceSettings
from rac_modifier.errors import RacError
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.problems import load_problems
from rac_modifier.traces.prompts import render_prompt
from rac_modifier.traces.store import Trace, TraceStore
from rac_modifier.traces.subject import Subject


@dataclass(frozen=True)
class CalibrationSet:
    """The loader, where its traces came from, and the traces that were kept out of it."""

    loader: CalibrationLoader
    store: TraceStore | None
    held_out: tuple[Trace, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For the run record: counts, and the trace store with its hash."""
        record: dict[str, Any] = {"calibration": self.loader.composition.as_dict(), "trace_store": None}
        if self.store is not None:
            record["trace_store"] = {"path": str(self.store.path), "sha256": self.store.sha256()}
        return record


def build_calibration_set(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    progress: bool = True,
) -> CalibrationSet:
    """Sample what traces are missing, and mix the calibration set that `calibration` describes.

    Raises:
        RacError: see `collect_traces` and `mix`; a mixture with traces that ends up without any trace token.
    """
    candidates: dict[str, Iterable[CalibrationSequence]] = {}
    store, held_out = None, list[Trace]()
    share = calibration.mixture.get("traces", 0.0)
    if share:
        store = collect_for_calibration(model, tokenizer, traces, calibration, progress)
        held_out, others = split(store, calibration.held_out_tokens)
        candidates["traces"] = [trace_sequence(trace) for trace in others]
    if calibration.mixture.get("prompts"):
        candidates["prompts"] = _prompts(tokenizer, traces)
    if calibration.mixture.get("generic"):
        candidates["generic"] = [
            generic_sequence(ids) for ids in generic_token_sequences(tokenizer, calibration.generic, calibration.seed)
        ]
    sequences, composition = mix(candidates, calibration)
    if share:
        require_traces(composition)
    logger.info(composition.describe())
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return CalibrationSet(CalibrationLoader(sequences, composition, calibration, pad), store, tuple(held_out))


def collect_for_calibration(
    model: PreTrainedModel | Subject,
    tokenizer: PreTrainedTokenizerBase,
    traces: TraceSettings,
    calibration: CalibrationSettings,
    progress: bool = True,
) -> TraceStore:
    """Collect until the traces fill their share of the budget, counted as they will be cut (`max_sequence_tokens`), beside
    those that are held out.

    Where servers sample (`traces.engine`), a `Subject` stands for the model, whose weights are then not loaded.

    Raises:
        RacError: see `collect_traces`; a mixture that gives traces no share.
    """
    wanted = round(calibration.tokens * calibration.mixture.get("traces", 0.0))
    if not wanted:
        raise RacError(f"the mixture {calibration.mixture} gives traces no share, so there is nothing to collect")
    tokens, retry_failed = wanted + calibration.held_out_tokens, traces.retry_failed
    while True:
        with contextlib.nullcontext() if isinstance(model, Subject) or traces.engine else on_accelerator(model):
            store = collect_traces(
                model,
                tokenizer,
                traces.store,
                problems=traces.problems,
                sampling=traces.sampling,
                tokens=tokens,
                engine=traces.engine,
                retry_failed=retry_failed,
                allow_off_policy=traces.allow_off_policy,
                progress=progress,
            )
        longest = calibration.max_sequence_tokens or store.counts.tokens
        held_out, others = split(store, calibration.held_out_tokens)
        usable = sum(min(trace.tokens, longest) for trace in others)
        if usable >= wanted:
            return store
        retry_failed = False  # once a run is enough
        held = sum(trace.tokens for trace in held_out)
        more = (store.counts.tokens - held) * wanted / usable if usable else wanted
        tokens = max(store.counts.tokens + 1, math.ceil(held + more))


def _prompts(tokenizer: PreTrainedTokenizerBase, traces: TraceSettings) -> Iterator[CalibrationSequence]:
    sampling = traces.sampling
    for problem in load_problems(traces.problems, sampling.seed):
        yield prompt_sequence(render_prompt(tokenizer, problem.question, sampling.system_prompt, sampling.template))


@contextlib.contextmanager
def on_accelerator(model: PreTrainedModel) -> Iterator[None]:
    """Sample on the accelerator even though oneshot loads the model on the CPU; back afterwards.

    A model that is placed already (device_map, offloading) stays where it is.
    """
    placed = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    if placed or not torch.accelerator.is_available():
        yield
        return
    device = torch.accelerator.current_accelerator()
    logger.info(f"moving the model to {device} to sample traces")
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]
