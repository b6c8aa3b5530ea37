"""Rounding pruned weights to the values of a quantization scheme; zeros stay zero."""
