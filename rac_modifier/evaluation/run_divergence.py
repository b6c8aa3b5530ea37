"""How far a run moves the model: prepared before pruning, measured after it, written into the run record."""

from __future__ import annotations

from typing import Any

from loguru import logger

from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.errors import RacError
from rac_modifier.evaluation.dense_reference import DenseReference


class RunDivergence:
    """KL and top-1 agreement on the traces that a calibration set holds out; or why that is not measured."""

    def __init__(self, model: Any, calibration: CalibrationSet, *, off_policy: bool):
        """One forward pass of the dense model over the held-out traces; `off_policy`: they may be another model's."""
        self._reference: DenseReference | None = None
        self._why = ""
        if not calibration.held_out:
            self._why = "no traces were held out (calibration.held_out_tokens, or a mixture without traces)"
        elif off_policy:
            self._why = "the traces may be another model's (traces.allow_off_policy)"
        else:
            try:
                sequences = [((*t.prompt_ids, *t.completion_ids), len(t.prompt_ids)) for t in calibration.held_out]
                self._reference = DenseReference(model, sequences)
            except RacError as error:
                self._why = str(error)
        if self._reference is None:
            logger.info(f"divergence from the dense model will not be measured: {self._why}")
        else:
            logger.info(
                f"{len(calibration.held_out)} traces are held out ({self._reference.tokens:,} completion tokens): divergence "
                "from the dense model will be measured on them, at two forward passes over them"
            )

    def measure(self, model: Any) -> dict[str, Any]:
        """The entry of the run record. What goes wrong here is recorded, and does not cost the pruned model."""
        if self._reference is None:
            return {"not_measured": self._why}
        try:
            result = self._reference.divergence(model, label="pruned")
        except (RacError, RuntimeError) as error:
            logger.warning(f"divergence from the dense model was not measured: {error}")
            return {"not_measured": str(error)}
        logger.info(
            f"divergence from the dense model on {result.tokens:,} held-out tokens of its own: "
            f"KL {result.kl:.4f} nats a token, top-1 agreement {result.agreement:.1%}"
        )
        record = result.as_dict()
        del record["label"]
        return record
