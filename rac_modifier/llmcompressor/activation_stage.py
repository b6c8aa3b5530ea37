"""The layers whose activations may have 8 bits, chosen at the end of a run on the traces that it holds out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from llmcompressor.entrypoints.oneshot import Oneshot
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import ActivationChoice, choose_activations
from rac_modifier.evaluation.teacher_forcing import sequence_of
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from rac_modifier.settings.quantization import QuantizationSettings
from rac_modifier.traces.records import Trace

SOURCE = "held-out traces"
_SETTING = "quantization.int8_activation_limit"


class ActivationStage:
    """Measure on held-out traces what `rac activations` measures on samples.

    A failure is recorded and ends no run.
    """

    def __init__(self, limit: float, quantizer: GroupQuantizer):
        self._limit, self._quantizer = limit, quantizer
        self._why = "the run did not end"
        self._choice: ActivationChoice | None = None

    @classmethod
    def of(
        cls,
        settings: QuantizationSettings,
        quantizer: GroupQuantizer,
        names: Mapping[torch.nn.Module, str],
        oneshot: Oneshot | None,
    ) -> Self | None:
        """Return None where the recipe sets no limit; `names`: of the pruned modules.

        Raises:
            RacError: there is nothing to choose, or `oneshot` saves a checkpoint without a record.
        """
        if (limit := settings.int8_activation_limit) is None:
            return None
        if oneshot is not None and not oneshot.model_args.save_compressed:
            raise RacError(
                f"{_SETTING}: {limit} has no effect beside oneshot's save_compressed=False: only "
                "packed checkpoints record it; leave one of them out"
            )
        if not quantizer.integer_layers(names, lambda name: 0.0):
            raise RacError(
                f"{_SETTING}: {limit} has no effect here: no pruned module is int8 or int4 as the "
                "CPU kernels multiply it (routed experts aside); leave it out, or set scheme: W8A16 "
                "for other modules"
            )
        return cls(limit, quantizer)

    def measure(
        self,
        model: Any,
        names: Mapping[torch.nn.Module, str],
        results: Mapping[str, Mapping[str, Any]],
        held_out: Sequence[Trace],
    ) -> None:
        """Choose among the modules `names`, whose weights are rounded.

        `results`: what the run recorded of each.
        """
        try:
            layers = self._quantizer.integer_layers(
                names, lambda name: results[name]["relative_error"]
            )
            if not held_out:
                raise RacError("no traces were held out; raise calibration.held_out_tokens")
            sequences = [sequence_of(trace) for trace in held_out]
            with self._quantizer.as_served():
                self._choice = choose_activations(model, layers, sequences, self._limit)
            logger.info(f"activations, on held-out traces: {self._choice.describe()}")
        except (RacError, RuntimeError) as error:
            self._why = str(error)
            logger.warning(f"{_SETTING}: not measured, so all activations keep 16 bits: {error}")

    @property
    def modules(self) -> Sequence[str]:
        """The modules with activations of 8 bits."""
        return [] if self._choice is None else self._choice.modules

    def record(self) -> Mapping[str, Any]:
        """Return the entry of the run record, as `rac activations` writes it."""
        choice = self._choice
        return {"activations": choice.as_dict(SOURCE) if choice else {"not_measured": self._why}}
