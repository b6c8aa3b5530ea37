"""The vLLM plugin: loads packed sparse checkpoints and runs them on the sparse kernels."""

METHOD = "rac"  # the quantization method in vLLM, and the quant_method of packed checkpoints
OLD_METHOD = "rac-sparse"  # its name before 0.2, which `--quantization` still takes
