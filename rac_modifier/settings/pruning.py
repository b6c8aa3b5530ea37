"""What a user sets about pruning and quantization: pattern, solver, schemes, modules, storage.

compressed-tensors is not imported, so that a recipe is checked fast. It checks the schemes where
the modifier starts (llmcompressor/quantizer.py).
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rac_modifier.errors import RacError
from rac_modifier.settings.check import CONFIG, Settings, check_names, refuse_idle
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.solvers import SOLVERS, Method

# compressed-tensors' names, compared by tests/contracts/test_compressed_tensors.py.
PRESET_SCHEMES = frozenset((
    "UNQUANTIZED", "W4A16_ASYM", "W8A8", "INT8", "W4AFP8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK",
    "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4", "MXFP8A16", "MXFP8",
    "W2A4", "W2A8", "W2A16", "W3A4", "W3A8", "W3A16", "W4A4", "W4A8", "W4A16",
    "W5A8", "W5A16", "W6A8", "W6A16", "W7A8", "W7A16", "W8A16",
))  # fmt: skip
_MOST_BITS = 16
# An observer finds scales while it calibrates; here quantization/scales.py searches for them.
_WITHOUT_EFFECT = {
    "observer": "scales are searched for, and no observer runs",
    "observer_kwargs": "scales are searched for, and no observer runs",
    "zp_dtype": "zero points have as many bits as the codes, and symmetric schemes have none",
    "actorder": "dense weights are rounded by falling second moments, sparse ones in their order",
}


class QuantizationSettings(Settings):
    """How the pruned modules are quantized, as in llm-compressor's QuantizationModifier."""

    scheme: str | dict[str, list[str]] | None = None
    """A preset: W4A16, W8A16, W8A8, FP8_DYNAMIC; or a mapping from preset to targets."""

    config_groups: dict[str, dict[str, Any]] | None = None
    """Instead of a preset: compressed-tensors' schemes by name, each with its targets."""

    group_size: int | None = Field(None, ge=1, le=65_536)
    """Inputs that share a scale, for a preset with groups; default: the preset's, 128 of W4A16."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if (self.scheme is None) == (self.config_groups is None):
            raise RacError("quantization: set scheme or config_groups, for example scheme: W4A16")
        refuse_idle(
            self, (self.scheme is None, "group_size", "beside config_groups, which have their own")
        )
        for name in [self.scheme] if isinstance(self.scheme, str) else self.scheme or ():
            if name.upper() not in PRESET_SCHEMES:
                raise RacError(
                    f"scheme {name!r}: no preset; use W4A16, W8A8, FP8_DYNAMIC, or config_groups"
                )
        for name, targets in (self.scheme if isinstance(self.scheme, dict) else {}).items():
            check_names(targets, f"scheme.{name}")
        for name, group in (self.config_groups or {}).items():
            check_names(group.get("targets") or [], f"config_groups.{name}.targets")
            for part, arguments in group.items():
                if isinstance(arguments, Mapping):
                    _check_arguments(arguments, f"config_groups.{name}.{part}")
        return self


def _check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    bits = arguments.get("num_bits")
    if bits is not None and (type(bits) is not int or not 1 <= bits <= _MOST_BITS):
        raise RacError(f"{where}.num_bits is {bits!r}; use a whole number up to {_MOST_BITS}")
    for name, why in _WITHOUT_EFFECT.items():
        if arguments.get(name):
            raise RacError(
                f"{where}.{name}: {arguments[name]!r} has no effect here: {why}; leave it out"
            )


Preset = Literal["quality", "fast", "paper"]
Order = Literal["auto", "group", "layer"]
UNSTRUCTURED = "0:0"
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"solver": "alps", "refit": False, "reconstruct": "dense", "order": "auto"},
    "fast": {"solver": "sparsegpt", "refit": True, "reconstruct": "dense", "order": "auto"},
    "paper": {"solver": "sparsegpt", "refit": False, "reconstruct": "pruned", "order": "layer"},
}
"""What each preset sets."""

# Of ALPS, in stages of at most 4; 11 leave 0.3 to 2 % more of the error than 12.
ITERATIONS = 12
REFIT_STEPS = 10  # conjugate-gradient steps of a refit at most; each costs an iteration of ALPS
EXPERT_FLOOR = 512


class PruningSettings(BaseModel):
    """The settings of ReasoningAwareSparseGPTModifier apart from calibration."""

    model_config = ConfigDict(**CONFIG)

    sparsity: float | None = None
    """Share of the weights to prune, anywhere; not with an N:M mask_structure, or solver: keep
    or none."""

    mask_structure: str | None = None
    """N:M prunes N of every M consecutive inputs, as in SparseGPTModifier; "0:0" is
    unstructured, the default. With solver: keep, 2:4 if all pruned modules have it."""

    quantization: QuantizationSettings | None = None
    """Also quantize the pruned modules, in the same pass: kept weights are rounded to the scheme's
    values, the others compensate for it, and zeros stay."""

    preset: Preset = "quality"
    """quality: alps towards the dense model's outputs; fast: sparsegpt with a refit towards them;
    paper: sparsegpt as in the RAC paper. It sets solver, refit, reconstruct and order where the
    recipe does not."""

    solver: Method = "alps"
    """How the pruned weights are chosen (default: the preset's). keep: the model's zeros, to
    quantize a sparse model; none: nothing is pruned, to quantize a dense model."""

    refit: bool = False
    """Fit the kept weights again once the mask is chosen (default: the preset's)."""

    reconstruct: Literal["dense", "pruned"] = "dense"
    """The output that a pruned module aims at (default: the preset's). dense: the dense model's,
    which makes up for what earlier modules lost, at the cost of both models' activations; pruned:
    its dense weights on the pruned model's activations, as in the paper."""

    iterations: int = Field(ITERATIONS, ge=1, le=10_000)
    """Iterations of alps; its time grows with them."""

    dampening_frac: float = Field(0.01, gt=0, le=100)
    """Dampening added to the Hessian, as a share of its mean diagonal."""

    order: Order = "auto"
    """group: each group of modules that read the same input is pruned on the activations of the
    model as pruned so far; layer: all Hessians of a decoder layer are from one pass, as in the
    paper's code; auto: group where the model's code can be traced inside its layers, else layer
    (default: the preset's)."""

    expert_floor: int = Field(EXPERT_FLOOR, ge=1, le=10**9)
    """Least tokens that calibrate a routed expert: where the router sends fewer to it, those are
    added that it all but sends there, by its logits; the log and the run record name these
    experts."""

    targets: list[str] = ["Linear"]
    """Modules to prune: class names, names, or re: patterns."""

    ignore: list[str] = []
    """Modules to leave dense, besides lm_head and router gates, which are pruned only if targets
    name them."""

    storage: Literal["packed", "dense"] = "packed"
    """packed: sparse-24-bitmask for 2:4, else sparse-bitmask; dense: ordinary weights with
    zeros."""

    _pattern: Pattern | None = PrivateAttr(default=None)

    @field_validator("mask_structure", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        text = 'no pattern; write "2:4", or sparsity: 0.5 for a share'
        if isinstance(value, int) and value >= 60:
            # in YAML 1.1, colons separate digits of base 60
            text = ":".join(map(str, divmod(value, 60)))
            text = f'what YAML reads {text} as; write "{text}", in quotes'
        if isinstance(value, int | float):
            raise RacError(f"{value} is {text}")
        return value

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _name_modules(cls, value: Any, info: ValidationInfo) -> Any:
        names = [value] if isinstance(value, str) else value
        check_names(names, str(info.field_name))
        return names

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # the schema refuses an unknown preset
        return {**PRESETS.get(str(values.get("preset", "quality")), {}), **values}

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        solver = SOLVERS[self.solver]
        if not solver.prunes:
            if self.quantization is None:
                raise RacError(
                    "solver: none without quantization does nothing; set quantization, such as "
                    "{scheme: W4A16}, or leave solver out and set a sparsity"
                )
            self._pattern = Pattern.nothing()
        elif self.solver != "keep":
            self._pattern = Pattern.parse(self.mask_structure or UNSTRUCTURED, self.sparsity)
        elif self.mask_structure not in (None, UNSTRUCTURED):
            self._pattern = Pattern.parse(self.mask_structure, None)
        if self.order == "layer" and self.reconstruct == "dense":
            raise RacError(
                "order: layer has no dense activations; set reconstruct: pruned, or order: auto"
            )
        refuse_idle(
            self,
            (self.solver == "keep", "sparsity", "with solver: keep, the model's zeros"),
            (self.solver == "none", "sparsity mask_structure", "with solver: none"),
            (not solver.iterates, "iterations", f"with solver: {self.solver}; alps uses it"),
            (not self.fits_weights, "dampening_frac", "with a solver that fits no weight"),
            (self.order == "layer", "expert_floor", "with order: layer"),
        )
        return self

    @property
    def pattern(self) -> Pattern | None:
        """Return the pattern; None where `solver: keep` reads it off the model's zeros."""
        return self._pattern

    @property
    def prunes(self) -> bool:
        """Return whether any weight is pruned, or was: else the modules are only quantized."""
        return SOLVERS[self.solver].prunes

    @property
    def fits_weights(self) -> bool:
        """Return whether any weight is computed with the Hessian, rather than only selected."""
        return (
            self.refit
            or not SOLVERS[self.solver].only_scores
            or self.reconstruct == "dense"
            or self.quantization is not None
        )
