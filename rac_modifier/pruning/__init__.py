"""Patterns, Hessians and solvers: tensors in, tensors out."""

from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.patterns import Pattern, broken_groups, holds
from rac_modifier.pruning.solver import Method, Solution, solve

__all__ = ["Hessian", "Method", "Pattern", "Solution", "broken_groups", "holds", "solve"]
