"""Linear layers with packed weights, on the kernels of a backend that `choose` selects.

A backend is a package or module with the three functions of `interface.Backend`.
"""
