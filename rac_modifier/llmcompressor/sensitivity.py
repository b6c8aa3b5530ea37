"""How much each module's own pruning changes what the model predicts, measured: one module pruned, all others dense."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from compressed_tensors.utils import align_module_device, update_offload_parameter
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.shares import (
    Sensitivity,
    log_patterns,
    module_sizes,
    patterns_for,
    sensitive_shares,
)
from rac_modifier.processes import Processes
from rac_modifier.settings.pattern import Pattern

_TOKENS = 2048  # of the calibration set that the KL is measured on
_POSITIONS = 512  # of these tokens, whose dense predictions are kept and compared: 300 MB for a vocabulary of 150,000
_THRESHOLDS = 256
_SAMPLE = 1 << 20  # of a module's scores, for its thresholds
_ALONE = Processes()


def measured_patterns(
    model: PreTrainedModel,
    names: Mapping[torch.nn.Module, str],
    pattern: Pattern,
    loader: CalibrationLoader,
    processes: Processes = _ALONE,
) -> dict[str, Pattern]:
    """Patterns half-way from uniform to what the modules' measured KL suggests; see `sensitive_shares`.

    The first of several processes measures, since a module is changed meanwhile, and they may share the model's memory.

    Raises:
        RacError: see `measure_sensitivity`.
    """
    logger.info(f"allocation: kl takes {len(names) + 1} forward passes of about {_TOKENS:,} tokens")
    shares: dict[str, float] = {}
    if processes.is_first:
        shares = sensitive_shares(measure_sensitivity(model, loader, names, pattern.sparsity), pattern.sparsity)
    patterns = patterns_for(processes.from_first(shares), module_sizes(names), pattern.sparsity)
    log_patterns(patterns, pattern)
    return patterns


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel, loader: CalibrationLoader, names: Mapping[torch.nn.Module, str], sparsity: float
) -> dict[str, Sensitivity]:
    """KL(dense || dense but for one module) for each module of `names`, pruned to `sparsity` by Wanda's score.

    The score is W_ij^2 times the sum of squares of input j, compared over the whole module. One forward pass of about 2,048
    calibration tokens for the scores, and one more per module; weights are put back as they were.

    Raises:
        RacError: naming a module that no token reaches or whose measure is not finite.
    """
    batches = _first_rows(loader)
    squares, dense = _dense_pass(model, batches, names)
    found = {}
    for module, name in tqdm(names.items(), desc="sensitivity", unit="module", disable=None):
        if name not in squares:
            raise RacError(f"{name} saw no token of the first calibration batches; leave experimental.allocation out")
        with align_module_device(module):
            kept = module.weight.detach().clone()  # type: ignore[operator]
        scores = kept.float().square() * squares[name].to(kept.device)
        ordered = scores.flatten()[:: max(scores.numel() // _SAMPLE, 1)].sort().values
        mask = scores <= ordered[max(int(len(ordered) * sparsity) - 1, 0)]
        at = torch.linspace(0, len(ordered) - 1, _THRESHOLDS, dtype=torch.float64).long()
        update_offload_parameter(module, "weight", kept.masked_fill(mask, 0.0))
        try:
            kl = _divergence(model, batches, dense)
        finally:
            update_offload_parameter(module, "weight", kept)
        if not kl < float("inf"):
            raise RacError(
                f"{name}: pruning it alone changes the predictions by {kl} nats; leave experimental.allocation out"
            )
        lost = float(scores[mask].sum(dtype=torch.float64))
        found[name] = Sensitivity(kept.numel(), kl, ordered[at.to(ordered.device)].tolist(), lost)
    return found


@dataclass(frozen=True)
class _Rows:
    """Token ids [rows, length], which of them are no padding, and at which of those predictions are compared."""

    ids: torch.Tensor
    real: torch.Tensor
    compared: torch.Tensor


def _first_rows(loader: CalibrationLoader) -> list[_Rows]:
    """The first rows of the calibration set, up to `_TOKENS` tokens."""
    batches, tokens = [], 0
    for batch, weights in zip(loader, loader.token_weights, strict=True):
        real = (weights > 0).sum(1)
        rows = int((real.cumsum(0) + tokens < _TOKENS).sum()) + 1
        ids, counted = batch["input_ids"][:rows], weights[:rows] > 0
        batches.append((ids, counted))
        tokens += int(counted.sum())
        if tokens >= _TOKENS:
            break
    every = -(-tokens // _POSITIONS)
    result, seen = [], 0
    for ids, real in batches:
        index = real.flatten().cumsum(0).view(real.shape) + seen
        seen += int(real.sum())
        result.append(_Rows(ids, real, real & (index % every == 0)))
    return result


def _dense_pass(
    model: PreTrainedModel, batches: list[_Rows], names: Mapping[torch.nn.Module, str]
) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The sum of squares of each module's inputs [d], and log-probabilities [positions, vocabulary] per batch."""
    squares: dict[str, torch.Tensor] = {}
    current: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, real = args[0].float(), current[-1].to(args[0].device)
        if x.shape[:-1] == real.shape:  # not for an expert, which gets only some of the tokens
            x = x[real]
        sums = x.square().flatten(0, -2).sum(0)
        squares[names[module]] = squares.get(names[module], torch.zeros_like(sums)) + sums

    with contextlib.ExitStack() as stack:
        for module in names:
            stack.callback(module.register_forward_pre_hook(watch).remove)
        dense = []
        for rows in batches:
            current.append(rows.real)
            dense.append(_log_probabilities(model, rows))
    return squares, dense


def _divergence(model: PreTrainedModel, batches: list[_Rows], dense: list[torch.Tensor]) -> float:
    total = sum(
        float(F.kl_div(_log_probabilities(model, rows), p, log_target=True, reduction="sum"))
        for rows, p in zip(batches, dense, strict=True)
    )
    return total / sum(map(len, dense))


def _log_probabilities(model: PreTrainedModel, rows: _Rows) -> torch.Tensor:
    logits = model(input_ids=rows.ids.to(model.get_input_embeddings().weight.device), use_cache=False).logits  # type: ignore[arg-type]
    return logits[rows.compared.to(logits.device)].float().log_softmax(-1)
