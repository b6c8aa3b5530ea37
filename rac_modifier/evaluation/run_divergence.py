"""The divergence from the dense model that a run records, and what more calibration tokens can win."""

from __future__ import annotations

import math
import random
from typing import Any

from loguru import logger

from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.evaluation.divergence import DivergenceResult
from rac_modifier.evaluation.teacher_forcing import TokenSequence, sequence_of


class RunDivergence:
    """KL and top-1 agreement on held-out traces, or the reason why they are not measured.

    KL is measured on the same number of calibrated tokens too. It is lower there, and the gap closes as
    the calibration set grows. So the gap bounds what more tokens can win.
    """

    def __init__(self, model: Any, calibration: CalibrationSet, *, off_policy: bool):
        """Run the dense model over these traces, unless another model wrote them (`off_policy`)."""
        self._held_out: DenseReference | None = None
        self._calibrated: DenseReference | None = None
        self._why = ""
        if not calibration.held_out:
            self._why = (
                "no traces were held out (calibration.held_out_tokens, or a mixture without traces)"
            )
        elif off_policy:
            self._why = "the traces may be another model's (traces.allow_off_policy)"
        else:
            try:
                self._held_out = DenseReference(
                    model, [sequence_of(trace) for trace in calibration.held_out]
                )
                if calibrated := _calibrated(calibration, self._held_out.tokens):
                    self._calibrated = DenseReference(model, calibrated)
            except RacError as error:
                self._why = str(error)
        if self._held_out is None:
            logger.info(f"divergence from the dense model will not be measured: {self._why}")
        else:
            logger.info(
                f"{len(calibration.held_out)} traces are held out ({self._held_out.tokens:,} completion "
                "tokens): divergence from the dense model will be measured on them and on as many "
                "calibrated tokens, with two forward passes each"
            )

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the entry of the run record; a failure is recorded and does not stop the run."""
        if self._held_out is None:
            return {"not_measured": self._why}
        try:
            result = self._held_out.divergence(model, label="pruned")
            calibrated = (
                self._calibrated.divergence(model, label="pruned") if self._calibrated else None
            )
        except (RacError, RuntimeError) as error:
            logger.warning(f"divergence from the dense model was not measured: {error}")
            return {"not_measured": str(error)}
        logger.info(
            f"divergence from the dense model on {result.tokens:,} held-out tokens of its own: "
            f"KL {result.kl:.4f} nats per token, top-1 agreement {result.agreement:.1%}"
        )
        record = result.as_dict()
        del record["label"]
        if calibrated is not None:
            record["calibrated"] = {
                "kl": calibrated.kl,
                "kl_stderr": calibrated.kl_stderr,
                "tokens": calibrated.tokens,
            }
            if (line := outlook(result, calibrated)) is not None:
                logger.info(line)
        return record


def _calibrated(calibration: CalibrationSet, tokens: int) -> list[TokenSequence]:
    """Choose random traces of the calibration set with at least `tokens` completion tokens in all."""
    loader = calibration.loader
    traces = [s for s in loader.sequences if s.kind == "traces" and s.prompt_tokens < len(s.ids)]
    random.Random(loader.settings.seed).shuffle(traces)
    chosen: list[TokenSequence] = []
    for sequence in traces:
        if tokens <= 0:
            break
        chosen.append((sequence.ids, sequence.prompt_tokens))
        tokens -= len(sequence.ids) - sequence.prompt_tokens
    return chosen


def outlook(held_out: DivergenceResult, calibrated: DivergenceResult) -> str | None:
    """Say what more calibration tokens can win; None where a figure has too few answers for an error."""
    if held_out.kl_stderr is None or calibrated.kl_stderr is None:
        return None
    gap = held_out.kl - calibrated.kl
    figure = f"on {calibrated.tokens:,} calibrated tokens, KL is {calibrated.kl:.4f}"
    if gap <= 2 * math.hypot(held_out.kl_stderr, calibrated.kl_stderr):
        return f"{figure}: no gap beyond chance, so more calibration tokens would change little"
    return f"{figure}: more calibration tokens (calibration.tokens) can win a part of the gap of {gap:.4f}"
