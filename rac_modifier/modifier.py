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

import rac_modifier.pipelines.seam  # noqa: F401 - puts our pipelines in their registry places
from rac_modifier.calibration.batches import CalibrationLoader
from rac_modifier.calibration.gradients import gradient_weights
from rac_modifier.calibration.settings import CalibrationSettings, TraceSettings
from rac_modifier.calibration.source import CalibrationSet, build_calibration_set, on_accelerator
from rac_modifier.checkpoint.saving import SavePlan, save_sparse
from rac_modifier.errors import RacError
from rac_modifier.evaluation.run_divergence import RunDivergence
from rac_modifier.presets import Order, Preset, with_preset
from rac_modifier.pruning.collector import HessianCollector
from rac_modifier.pruning.cost import Cost, Group, Plan, groups_by_input, run_cost
from rac_modifier.pruning.group import prune_group
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.module_patterns import (
    Allocation,
    check_allocation,
    describe_patterns,
    listed_patterns,
    measured_patterns,
)
from rac_modifier.pruning.patterns import Pattern
from rac_modifier.pruning.solver import ITERATIONS, REFIT_STEPS, Method
from rac_modifier.pruning.statistics import GroupStatistics
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
    preset: Preset = Field(
        "quality",
        description="quality: alps towards the dense model's outputs; fast: sparsegpt with a refit towards them; "
        "paper: sparsegpt as in the RAC paper. Whatever is set beside it wins over what it sets",
    )
    solver: Method = Field("alps", description="how the pruned weights are found (default: the preset's)")
    refit: bool = Field(
        False,
        description="fit the kept weights anew once the mask is chosen (alps does so itself; default: the preset's)",
    )
    reconstruct: Literal["dense", "pruned"] = Field(
        "dense",
        description="the output that a pruned module aims at: dense: the dense model's, so that it makes up for what was lost "
        "before it, which needs the activations of both models; pruned: its dense weights on the pruned model's activations, the "
        "paper's way (default: the preset's)",
    )
    token_weights: Literal["uniform", "gradient"] = Field(
        "uniform",
        description="gradient: tokens count by the squared gradient of a softened Fisher loss; one backward pass over the "
        "calibration set, with the whole model on one device",
    )
    allocation: Allocation = Field(
        "uniform",
        description="how an unstructured sparsity is spread over modules. uniform: each loses the same share; kl: by how much "
        "each module's own pruning changes the predictions, moved half-way from uniform, at a forward pass of 2,048 tokens a "
        "module; or shares by module name or re: pattern (the last match counts), where modules that none names take "
        "what makes the average the sparsity asked for",
    )
    block_size: int = Field(128, ge=1, description="columns that SparseGPT settles before it updates the rest")
    iterations: int = Field(ITERATIONS, ge=1, description="iterations of alps; its time grows with them")
    refit_steps: int = Field(
        REFIT_STEPS, ge=1, description="conjugate-gradient steps of a refit at most; one costs as much as an iteration"
    )
    dampening_frac: float = Field(
        0.01, gt=0, description="dampening added to the Hessian, as a share of its mean diagonal"
    )
    order: Order = Field(
        "auto",
        description="group: each group of modules that read the same input is pruned on what the already pruned model feeds it, "
        "in one pass; layer: all Hessians of a decoder layer come from one pass, then it runs again, as in the paper's code; "
        "auto: group where the model's code can be traced inside its layers, else layer, and the log and run record say which "
        "(default: the preset's)",
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
    _patterns: dict[str, Pattern] = PrivateAttr(default_factory=dict)
    _names: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _collector: HessianCollector | None = PrivateAttr(default=None)
    _calibration: CalibrationSet | None = PrivateAttr(default=None)
    _token_weights: dict[torch.nn.Module, list[torch.Tensor]] = PrivateAttr(default_factory=dict)
    _order: dict[str, str] = PrivateAttr(default_factory=dict)
    _results: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)
    _divergence: RunDivergence | None = PrivateAttr(default=None)
    _moved: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _settings_fit(self) -> ReasoningAwareSparseGPTModifier:
        self._pattern = Pattern.parse(self.mask_structure, self.sparsity)
        check_allocation(self.allocation, self._pattern)
        if self.order == "layer" and self.reconstruct == "dense":
            raise RacError("order: layer has no dense activations to aim at; set reconstruct: pruned, or order: auto")
        if self.order == "layer" and self.token_weights == "gradient":
            raise RacError(
                "order: layer cannot weigh each module's tokens by itself; set token_weights: uniform, or order: auto"
            )
        return self

    def calibrated_modules(self) -> dict[torch.nn.Module, str]:
        """The modules whose inputs are collected, and their names."""
        return dict(self._names)

    def describe_modules(self, modules: list[torch.nn.Module]) -> str:
        """Short names of modules that read the same input, for progress bars."""
        first = ".".join(self._names[modules[0]].split(".")[-4:])
        return f"{first} and {len(modules) - 1} more" if len(modules) > 1 else first

    @property
    def pattern(self) -> Pattern:
        """What is pruned of all modules together."""
        return self._pattern

    def cost(self, groups: list[Group]) -> Cost:
        """What these settings cost on modules of such shapes."""
        return run_cost(
            groups,
            Plan(
                **{name: getattr(self, name) for name in Plan.__annotations__ if name in type(self).model_fields},
                tokens=self.calibration.tokens,
                held_out_tokens=self.calibration.held_out_tokens,
            ),
        )

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations have to be carried beside the pruned model's."""
        return self.reconstruct == "dense"

    def use_order(self, order: Literal["group", "layer"], why: str) -> None:
        """The pipeline says how finely it goes.

        Raises:
            RacError: when the recipe asks for more.
        """
        if self.order == "group" and order != "group":
            raise RacError(f"order: group is not possible here: {why}; set order: layer")
        if self.token_weights == "gradient" and order != "group":
            raise RacError(f"token_weights: gradient is not possible here: {why}; set token_weights: uniform")
        self._order = {"order": order, "why": why, "reconstruct": self.reconstruct}
        if order == "layer" and self.reconstruct == "dense":
            self._order["reconstruct"] = "pruned"
            logger.warning(
                f"reconstruct: dense needs the model cut between its modules, which is not possible here ({why}): going layer by "
                "layer towards the pruned model's own outputs instead, which keeps less accuracy"
            )
        logger.info(f"pruning {order} by {order} ({why})")

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
        logger.info(f"counted cost, without sampling: {self.cost(groups_by_input(model, self._names)).describe()}")
        self._patterns = listed_patterns(model, self._names, self._pattern, self.allocation)
        if self._calibration is None:
            self._calibration = build_calibration_set(model, self._load_tokenizer(model), self.traces, self.calibration)
        if self.allocation == "kl":
            with on_accelerator(model):
                self._patterns = measured_patterns(model, self._names, self._pattern, self._calibration.loader)
        if self.token_weights == "gradient":
            with on_accelerator(model):
                self._token_weights = gradient_weights(model, self._calibration.loader, self._names)
        with on_accelerator(model):
            self._divergence = RunDivergence(model, self._calibration, off_policy=self.traces.allow_off_policy)
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
            self._prune(group.modules, group.hessian)

    def weights_for(self, modules: list[torch.nn.Module], batch: int) -> torch.Tensor:
        """The token weights [rows, length] of a batch for modules that read the same input: the mean of theirs."""
        if not self._token_weights:
            assert self._calibration is not None
            return self._calibration.loader.token_weights[batch]
        return torch.stack([self._token_weights[module][batch] for module in modules]).mean(0)

    def prune_group(self, modules: list[torch.nn.Module], statistics: GroupStatistics) -> None:
        """Prune modules that read the same input, on its statistics."""
        self._prune(modules, statistics.hessian, statistics.drift())

    def _prune(self, modules: list[torch.nn.Module], hessian: Hessian, drift: list[torch.Tensor] | None = None) -> None:
        names = [self._names[module] for module in modules]
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(align_module_device(module))
            results = prune_group(
                self.solver,
                names,
                [module.weight for module in modules],  # type: ignore[misc]
                hessian,
                drift,
                [self._patterns[name] for name in names],
                dampening_frac=self.dampening_frac,
                block_size=self.block_size,
                refit=self.refit,
                iterations=self.iterations,
                refit_steps=self.refit_steps,
            )
        for module, name, (weight, record) in zip(modules, names, results, strict=True):
            update_offload_parameter(module, "weight", weight)
            self._results[name] = record

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Stop watching; a module that no calibration token reached is an error, not a silent gap."""
        self.remove_hooks()
        missed = [name for name in self._names.values() if name not in self._results]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is {missed[0]}; add them to ignore, "
                "or calibrate on more tokens if they are experts"
            )

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Measure the result, once every modifier of the recipe is done with it."""
        if self._divergence is not None:
            self._moved = self._divergence.measure(state.model)
            self._divergence = None
        return True

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
            patterns=self._patterns,
            modules={name: module for module, name in self._names.items() if isinstance(module, torch.nn.Linear)},
            storage=self.storage,
            tokenizer=self.tokenizer,
            record={
                "method": self.solver,
                "order": self._order,
                "pattern": describe_patterns(self._pattern, self.allocation),
                "mask_structure": self.mask_structure,
                "seed": f"{self.traces.sampling.seed} for sampling, {self.calibration.seed} for the mixture",
                "modifier": self.model_dump(mode="json", exclude=_UPSTREAM_STATE),
                **self._calibration.as_dict(),
                "divergence": self._moved,
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
