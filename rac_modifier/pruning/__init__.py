"""Patterns, Hessians and solvers: tensors in, tensors out."""
