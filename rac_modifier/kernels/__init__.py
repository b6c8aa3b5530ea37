"""Linear layers with packed sparse weights, on the kernels of a backend.

A backend is a folder here whose package has the three functions of `interface.Backend`: `can_run`, `pack` and `linear`.
`choose` selects the backend of a device. Importing these modules loads torch and nothing heavier.
"""
