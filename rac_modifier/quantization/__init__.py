"""Rounding pruned weights to the values that a quantization scheme has, without losing a zero."""
