"""What the log and the run record say about the tokens that routed experts were calibrated on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, Literal

import torch
from llmcompressor.entrypoints.oneshot import Oneshot
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.experts import find_experts
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.pruning import EXPERT_FLOOR, PruningSettings

_SHOWN = 5  # starved experts per line of the log; the record has all


class ExpertRecord:
    """Of one run: empty where the model has no routed experts that are pruned."""

    def __init__(
        self, entry: PruningSettings, model: torch.nn.Module, names: Mapping[torch.nn.Module, str]
    ):
        self._entry, self._tokens = entry, entry.experts
        self._why: str | None = None
        self._found = bool(find_experts(model, names))
        self._layers: dict[str, dict[str, Any]] = {}

    def check(self, oneshot: Oneshot | None) -> None:
        """Refuse settings about experts that contradict `oneshot`, or that a model without experts does not use.

        Raises:
            RacError: naming the setting and its value.
        """
        entry = self._entry
        for name, default in (("experts", "routed"), ("expert_floor", EXPERT_FLOOR)):
            value = getattr(entry, name)
            if value != default and name in entry.model_fields_set and not self._found:
                raise RacError(
                    f"{name}: {value!r} has no effect here: no routed expert of this model is pruned; leave it out"
                )
        routed_only = oneshot is not None and not oneshot.dataset_args.moe_calibrate_all_experts
        if self._found and entry.experts == "all" and routed_only:
            raise RacError(
                "oneshot was given moe_calibrate_all_experts=False, and the recipe has experts: all; leave one of them out"
            )

    def use_order(self, order: Literal["group", "layer"], why: str) -> None:
        """Layer by layer, every expert gets all tokens, which is said here."""
        if order == "layer" and self._found:
            self._tokens, self._why = "all", f"layer by layer ({why})"
            if self._entry.experts != "all" and self._entry.order != "layer":
                logger.warning(
                    f"experts: {self._entry.experts} needs the model cut between its modules, which is not possible here "
                    f"({why}): each expert is calibrated on all tokens instead, which keeps less accuracy"
                )

    def add(self, name: str, tokens: Mapping[str, ExpertTokens]) -> None:
        """The experts of the layer `name` are pruned."""
        routed = [one.routed for one in tokens.values()]
        least, median, most = min(routed), statistics.median(routed), max(routed)
        starved = {
            expert: one for expert, one in tokens.items() if one.added and self._tokens == "routed"
        }
        self._layers[name] = {
            "experts": len(tokens),
            "routed": {"least": least, "median": median, "most": most},
            "starved": {
                expert: {
                    "routed": one.routed,
                    "added": one.added,
                    **({"evenly": True} if one.evenly else {}),
                }
                for expert, one in starved.items()
            },
        }
        logger.info(
            f"{name}: {least:,} to {most:,} tokens are routed to each of {len(tokens)} experts, median {median:,}"
        )
        if starved:
            shown = ", ".join(
                f"{e.rpartition('.')[2]} ({one.routed:,})"
                for e, one in list(starved.items())[:_SHOWN]
            )
            more = f" and {len(starved) - _SHOWN} more" if len(starved) > _SHOWN else ""
            evenly = any(one.evenly for one in starved.values())
            others = (
                "others, evenly spread since its router is not known,"
                if evenly
                else "those nearest to being so"
            )
            logger.warning(
                f"{name}: fewer than expert_floor ({self._entry.expert_floor:,}) tokens are routed to the experts {shown}{more}; "
                f"{others} were added to calibrate them. More traces (calibration.tokens) would help"
            )

    def record(self) -> dict[str, Any]:
        """For the run record; empty without routed experts."""
        if not self._found:
            return {}
        floor = {"floor": self._entry.expert_floor} if self._tokens == "routed" else {}
        why = {"why": self._why} if self._why else {}
        return {"experts": {"calibrated on": self._tokens, **why, **floor, "layers": self._layers}}
