"""The vLLM plugin: loads packed sparse checkpoints and runs them on the sparse kernels."""

METHOD = "rac"  # the quantization method in vLLM, and the quant_method of packed checkpoints
OLD_METHOD = "rac-sparse"  # the name of the method before 0.2, still accepted by `--quantization`
