"""Linear layers with packed weights, on the kernels of a backend that `choose` selects."""
