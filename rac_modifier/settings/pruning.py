"""What a user sets in a recipe entry about pruning; calibration has its settings in base.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.presets import Order, Preset, with_preset
from rac_modifier.settings.quantization import QuantizationSettings

Allocation = Literal["uniform", "kl"] | dict[str, float]


def check_allocation(allocation: Allocation, pattern: Pattern) -> None:
    """Refuse an allocation that no model could have.

    Raises:
        RacError: one beside an N:M pattern, or a share that is not between 0 and 1.
    """
    if allocation == "uniform":
        return
    if pattern.is_structured:
        raise RacError(
            f'allocation {allocation!r} beside mask_structure "{pattern.mask_structure}": N:M prunes the same share of every '
            'module; leave allocation out, or set mask_structure "0:0" and a sparsity'
        )
    for target, share in allocation.items() if isinstance(allocation, dict) else ():
        if not 0.0 < share < 1.0:
            raise RacError(
                f"allocation gives {target!r} the share {share}: must lie strictly between 0 and 1; name a module that is to "
                "stay dense in ignore"
            )


Method = Literal["sparsegpt", "alps", "wanda", "magnitude", "keep"]


# On layers of the reasoner and of SmolLM2 at 50 to 80 % and 2:4 the summed error is within 2 % of that after 12 iterations in
# three stages and 10 steps, which cost more; 12 in two stages leave 1 % more than 16, 8 leave 8 % more, 20 leave 1 % less.
ITERATIONS = 16


REFIT_STEPS = 10


class PruningSettings(BaseModel):
    """The settings of ReasoningAwareSparseGPTModifier but for calibration; each says what it does."""

    sparsity: float | None = Field(
        None, description="share of weights to prune; not needed beside an N:M mask_structure"
    )
    mask_structure: str = Field(
        "0:0",
        description='"N:M" prunes N of every M consecutive inputs, as in SparseGPTModifier; "0:0" is unstructured',
    )
    quantization: QuantizationSettings | None = Field(
        None,
        description="also quantize the pruned modules, in the same pass: kept weights are rounded to the scheme's values and "
        "the others that are kept make up for it; zeros stay",
    )
    preset: Preset = Field(
        "quality",
        description="quality: alps towards the dense model's outputs; fast: sparsegpt with a refit towards them; "
        "paper: sparsegpt as in the RAC paper. Whatever is set beside it wins over what it sets",
    )
    solver: Method = Field(
        "alps",
        description="how the pruned weights are found (default: the preset's); keep: the zeros are those that the model has, "
        "to quantize one that is sparse already",
    )
    refit: bool = Field(
        False,
        description="fit the kept weights anew once the mask is chosen (alps and keep do so themselves; default: the preset's)",
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

    _pattern: Pattern = PrivateAttr()

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _settings_fit(self) -> PruningSettings:
        self._pattern = Pattern.parse(self.mask_structure, self.sparsity)
        check_allocation(self.allocation, self._pattern)
        if self.order == "layer" and self.reconstruct == "dense":
            raise RacError("order: layer has no dense activations to aim at; set reconstruct: pruned, or order: auto")
        if self.order == "layer" and self.token_weights == "gradient":
            raise RacError(
                "order: layer cannot weigh each module's tokens by itself; set token_weights: uniform, or order: auto"
            )
        return self

    @property
    def pattern(self) -> Pattern:
        """What is pruned of all modules together."""
        return self._pattern
