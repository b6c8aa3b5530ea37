"""Patterns, Hessians and solvers: tensors in, tensors out."""

from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.masks import broken_groups, holds
from rac_modifier.pruning.solve import Method, Solution, solve
from rac_modifier.settings.pattern import Pattern

__all__ = ["Hessian", "Method", "Pattern", "Solution", "broken_groups", "holds", "solve"]
