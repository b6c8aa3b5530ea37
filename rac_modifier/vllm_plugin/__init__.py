"""Serving packed sparse checkpoints: kernels, and the vLLM plugin that runs them."""
