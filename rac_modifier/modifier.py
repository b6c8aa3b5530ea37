"""The llm-compressor modifier: reasoning-aware calibration and pruning in one recipe entry."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier, ModifierFactory
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator
from transformers import AutoTokenizer

import rac_modifier.calibration.seam  # noqa: F401 - puts our pipelines in their registry places
from rac_modifier.calibration.batches import CalibrationLoader
from rac_modifier.calibration.settings import CalibrationSettings, TraceSettings
from rac_modifier.calibration.source import CalibrationSet, build_calibration_set
from rac_modifier.checkpoint.saving import SavePlan, save_sparse
from rac_modifier.errors import RacError
from rac_modifier.pruning.collector import HessianCollector
from rac_modifier.pruning.patterns import Pattern
from rac_modifier.pruning.solver import Method, solve
from rac_modifier.pruning.targets import find_targets

NAME = "ReasoningAwareSparseGPTModifier"


class ReasoningAwareSparseGPTModifier(Modifier):
    """Prune a reasoning model on its own chain of thought (RAC, arXiv 2509.12464).

    For each linear layer W with inputs X, one-shot pruning minimises ||W X - W' X||_F^2 under the sparsity pattern. Here
    X = [X_prompt, X_decode]: prompts together with what the dense model itself wrote after them. The traces are sampled
    once (or read from a store), then pruned over layer by layer in upstream's sequential pipeline; every other modifier of
    the recipe that calibrates does so on the same loader. `save_pretrained` then writes a packed sparse checkpoint.

        pruning_stage:
          pruning_modifiers:
            ReasoningAwareSparseGPTModifier:
              mask_structure: "2:4"
    """

    requires_calibration_data: bool = True

    sparsity: float | None = Field(
        None, description="share of weights to prune; not needed beside an N:M mask_structure"
    )
    mask_structure: str = Field(
        "0:0",
        description='"N:M" prunes N of every M consecutive inputs, as in SparseGPTModifier; "0:0" is unstructured',
    )
    solver: Method = Field("sparsegpt", description="how the pruned weights are found")
    block_size: int = Field(128, ge=1, description="columns that SparseGPT settles before it updates the rest")
    dampening_frac: float = Field(
        0.01, gt=0, description="dampening added to the Hessian, as a share of its mean diagonal"
    )
    targets: list[str] = Field(["Linear"], description="modules to prune: class names, names, or re: patterns")
    ignore: list[str] = Field(
        [],
        description="modules to leave dense, beside lm_head and router gates, which are pruned only if targets name them",
    )
    storage: Literal["packed", "dense"] = Field(
        "packed",
        description="packed: sparse-24-bitmask for 2:4, else sparse-bitmask; dense: ordinary weights with zeros",
    )
    tokenizer: str | None = Field(None, description="tokenizer to render and read with; default: the model's own")
    traces: TraceSettings = Field(TraceSettings(), description="where the chain-of-thought traces come from")
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="how much of what is calibrated on")

    _pattern: Pattern = PrivateAttr()
    _names: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _collector: HessianCollector | None = PrivateAttr(default=None)
    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _results: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _pattern_makes_sense(self) -> ReasoningAwareSparseGPTModifier:
        self._pattern = Pattern.parse(self.mask_structure, self.sparsity)
        return self

    @property
    def stops_forward(self) -> bool:
        """The hooks need no output, so the pipeline may end a pass at the last calibrated module."""
        return True

    def calibrated_modules(self) -> list[torch.nn.Module]:
        """The modules whose inputs are collected."""
        return list(self._names)

    def use_calibration_set(self, calibration: CalibrationSet) -> None:
        """Prune on a set that was built elsewhere, in place of the recipe's."""
        self._calibration = calibration

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked, then sample and mix the calibration set."""
        _refuse_distributed()
        if isinstance(state.data.calib, CalibrationLoader):
            raise RacError(f"the recipe has two {NAME}; write one, with targets that cover both")
        if state.data.calib is not None:
            raise RacError(
                f"oneshot was given a dataset, and {NAME} brings its own calibration set: leave the dataset argument out, "
                "or name the data in the recipe (traces.problems, calibration.generic)"
            )
        model = state.model
        self._names = find_targets(model, self.targets, self.ignore, self._pattern)
        logger.info(f"pruning {len(self._names)} modules: {self._pattern.describe()}")
        if self._calibration is None:
            self._calibration = build_calibration_set(model, self._load_tokenizer(model), self.traces, self.calibration)
        state.data.calib = self._calibration.loader
        save_sparse(model, self._plan)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch the inputs of every module to prune."""
        collector = self._collector = HessianCollector(self._names)

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            loader, batch = state.data.calib, state.current_batch_idx
            if not isinstance(loader, CalibrationLoader):
                raise RacError("the calibration pipeline does not run on RAC's loader; use pipeline='independent'")
            collector.observe(module, args[0], loader.token_weights[batch], batch)

        for module in self._names:
            self.register_hook(module, hook, "forward_pre")  # type: ignore[arg-type]

    def on_subgraph_start(self, modules: list[torch.nn.Module]) -> None:
        """Called by the lean pipeline: these are the modules of the coming forward passes."""
        assert self._collector is not None
        self._collector.expect(module for module in modules if module in self._names)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Prune what the finished subgraph has calibrated."""
        assert self._collector is not None
        for group in self._collector.take(modules):
            names = [self._names[module] for module in group.modules]
            with contextlib.ExitStack() as stack:
                for module in group.modules:
                    stack.enter_context(align_module_device(module))
                solutions = solve(
                    self.solver,
                    [module.weight for module in group.modules],  # type: ignore[misc]
                    group.hessian.matrix(names[0]),
                    self._pattern,
                    names=names,
                    block_size=self.block_size,
                    dampening_frac=self.dampening_frac,
                )
            for module, name, solution in zip(group.modules, names, solutions, strict=True):
                update_offload_parameter(module, "weight", solution.weight)
                if solution.retries:
                    logger.warning(f"{name}: dampening was raised to {solution.dampening_used:g} to invert its Hessian")
                self._results[name] = {
                    "name": name,
                    "shape": list(solution.weight.shape),
                    "sparsity": float((solution.weight == 0).float().mean()),
                    "relative_error": solution.relative_error,
                    "dampening": solution.dampening_used,
                    "retries": solution.retries,
                    "dead_inputs": solution.dead_inputs,
                    "tokens": group.hessian.tokens,
                }

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Stop watching; a module that no calibration token reached is an error, not a silent gap."""
        self.remove_hooks()
        missed = [name for name in self._names.values() if name not in self._results]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is {missed[0]}; add them to ignore, "
                "or calibrate on more tokens if they are experts"
            )

    def _load_tokenizer(self, model: Any) -> Any:
        source = self.tokenizer or model.config._name_or_path
        try:
            return AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RacError(
                f"no tokenizer could be loaded from {source!r} ({error}); name one in the recipe (tokenizer: path or id)"
            ) from error

    def _plan(self) -> SavePlan:
        assert self._calibration is not None
        return SavePlan(
            pattern=self._pattern,
            modules={name: module for module, name in self._names.items() if isinstance(module, torch.nn.Linear)},
            storage=self.storage,
            tokenizer=self.tokenizer,
            record={
                "method": self.solver,
                "pattern": self._pattern.describe(),
                "mask_structure": self.mask_structure,
                "seed": f"{self.traces.sampling.seed} for sampling, {self.calibration.seed} for the mixture",
                "modifier": self.model_dump(mode="json", exclude=_UPSTREAM_STATE),
                **self._calibration.as_dict(),
                "modules": list(self._results.values()),
            },
        )


_UPSTREAM_STATE = set(Modifier.model_fields)


def _refuse_distributed() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (
        torch.distributed.is_available() and torch.distributed.is_initialized()
    ):
        raise RacError(
            f"{NAME} does not run under torchrun yet: each process would prune on its own part of the data; "
            "start it as one process (device_map or upstream's offloading spreads a large model)"
        )


ModifierFactory.register(NAME, ReasoningAwareSparseGPTModifier)
