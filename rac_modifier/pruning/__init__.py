"""Patterns, Hessians and solvers: tensors in, tensors out."""

from rac_modifier.pruning.hessian import Hessian, Statistics
from rac_modifier.pruning.masks import holds
from rac_modifier.pruning.solve import Solution, solve
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Method

__all__ = ["Hessian", "Method", "Pattern", "Solution", "Statistics", "holds", "solve"]
