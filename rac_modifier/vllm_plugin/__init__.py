"""The vLLM plugin: loads packed sparse checkpoints and runs them on the sparse kernels."""

METHOD = "rac"  # the quantization method in vLLM
