"""The solvers that a recipe can name and what each needs, without torch: a line per solver."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Solver:
    """What recipes and runs know of a solver, whose `prune` is step 3 of pruning/solve.py."""

    module: str  # of rac_modifier/pruning
    needs_factor: bool = False  # of the damped Hessian
    always_refits: bool = False  # whatever `refit` is
    batches: bool = False  # gains from several problems in a call
    iterates: bool = False  # takes `iterations`
    only_scores: bool = False  # leaves kept weights as they are, and dead inputs to their scores
    prunes: bool = True


SOLVERS = {
    "sparsegpt": Solver("sparsegpt", needs_factor=True, batches=True),
    "alps": Solver("alps", always_refits=True, iterates=True),
    "wanda": Solver("scores", only_scores=True),
    "magnitude": Solver("scores", only_scores=True),
    "keep": Solver("scores", always_refits=True),
    "none": Solver("scores", prunes=False),
}

if TYPE_CHECKING:
    Method = str
else:  # pydantic checks the names, and writes them into the schema
    Method = Literal[tuple(SOLVERS)]
