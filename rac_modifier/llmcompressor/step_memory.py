"""Memory of the steps of a solver, and of attention in a forward pass: counted where they are written, for memory.py.

The numbers of matrices are those that live at once at the most, in the order of the code: pruning/solve.py, alps.py, refit.py,
sparsegpt.py, and quantization/solve.py. tests/llmcompressor/test_step_memory.py compares each with what is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rac_modifier.pruning.blocked import BLOCK as CORNER
from rac_modifier.pruning.linalg import AT_ONCE_ON_CPU, BLOCK, VECTORS
from rac_modifier.settings.pruning import Method

_BLOCK = 128  # inputs that are pruned or rounded before the others are corrected
_SCORES_ONLY: tuple[Method, ...] = ("wanda", "magnitude")  # methods that factor no Hessian


@dataclass(frozen=True)
class SolverMemory:
    """The steps that a recipe takes with a group of d inputs and r outputs.

    Attributes:
        solver: of the recipe.
        dense_target: whether there is a cross moment.
        refits: whether kept weights are fitted anew after the mask is chosen.
        rounds: whether weights are rounded.
        zero_points: whether they are rounded to a grid with zero points.
        float32: whether the model's weights are float32; others are converted first where they are rounded.
        bf16: whether products are bfloat16, so that some matrices are there in it too.
    """

    solver: Method
    dense_target: bool = False
    refits: bool = False
    rounds: bool = False
    zero_points: bool = False
    float32: bool = True
    bf16: bool = True

    def steps(self, columns: int, rows: int) -> dict[str, float]:
        """Of each step, how many numbers of float32 are there at the most: Hessian, factor, buffers and blocks of inputs."""
        block = min(_BLOCK, columns)
        sizes = (columns**2, columns * rows, block * rows, block**2)
        found = {
            name: sum(count * size for count, size in zip(counts, sizes, strict=True))
            for name, counts in self._counts().items()
        }
        part = min(AT_ONCE_ON_CPU, columns * rows)
        if self.solver not in _SCORES_ONLY:  # whose scores take more
            found["result"] += min(VECTORS, rows) * (columns + min(BLOCK, columns))
        if self.solver == "alps":
            found["pruning"] += (
                3 * part + min(CORNER, columns) ** 2 / 2
            )  # what is beside a corner while it is inverted
        if self.refits:
            found["refit"] += part
        return found

    def _counts(self) -> dict[str, tuple[float, float, float, float]]:
        """Of each step, how many matrices [d, d], [r, d], [r, block] and [block, block]."""
        half = 0.5 if self.bf16 else 0.0
        converted = 0.0 if self.float32 or not self.rounds else 1.0
        given = 2.0 * self.dense_target + converted  # cross moment and target
        factored = self.dense_target or self.solver == "sparsegpt"
        factor = float(factored and self.rounds)  # rounding uses it again
        by_score = self.solver in _SCORES_ONLY
        found = {
            "result": (
                1.0 + factor,
                given + (4.5 if by_score else 2.75 if self.float32 or self.rounds else 3.25),
                0.0,
                0.0,
            )
        }
        if self.dense_target:
            found["target"] = (
                2.0,
                converted + 5.0,
                0.0,
                0.0,
            )  # both moments, and solutions with their right sides
        if self.solver == "sparsegpt":
            found["pruning"] = (2.0, given + 2.25, 4.5, 5.0)
        if self.solver == "alps":
            # the matrix, its factor or its inverse are in one place, also in bfloat16
            found["pruning"] = (2.0 + factor, given + 3.25 - half, 0.0, 0.0)
            found["final mask"] = (2.0 + factor, given + 3.75, 0.0, 0.0)  # scores, and masks
        if self.refits:
            found["refit"] = (
                1.0 + half + factor,
                given + 4.25 + half,
                2.0 - 2 * half,
                0.0,
            )  # and 256 rows of a product
        if self.rounds:
            # inputs are sorted where pruning left no factor in their own order
            in_order = 0.0 if factored and self.solver != "none" else 3.0 + self.zero_points
            found["rounding"] = (2.0, given + 6.25 + self.zero_points + in_order, 5.25, 4.0)
        return found


@dataclass(frozen=True)
class Attention:
    """Bytes of attention: `kept` as masks and positions of all batches, and `peak` while the largest batch runs."""

    kept: int = 0
    peak: int = 0

    @classmethod
    def of(cls, config: Any, batches: Iterable[tuple[int, int]], itemsize: int) -> Attention:
        """Of a model with this config, for batches of (rows, length), with numbers of `itemsize` bytes.

        llm-compressor traces under eager attention: each batch has a mask [rows, 1, length, length] per kind of layer, which
        stays in its cache, and scores [rows, heads, length, length] are there twice (of less than four bytes also in float32).
        """
        heads = getattr(config, "num_attention_heads", None) or 0
        batches = list(batches)
        if not heads or not batches:
            return cls()
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        kinds = len(set(getattr(config, "layer_types", None) or ["full_attention"]))
        masks = sum(rows * length**2 for rows, length in batches) * kinds
        tokens = sum(rows * length for rows, length in batches)
        repeated = 2 * heads if groups < heads else 0
        per_token = 2 * config.hidden_size + (heads + 2 * groups + repeated) * width
        of_scores = 2 * itemsize if itemsize >= 4 else itemsize + 8
        peak = max(
            rows * length * (per_token * itemsize + heads * length * of_scores)
            for rows, length in batches
        )
        return cls((masks + 2 * tokens * width) * itemsize, peak)
