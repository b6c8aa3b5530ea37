"""Saved models: packed sparse weights, loading and inspecting them, and their records.

Nothing is re-exported here, so that serving can import a module of this package without importing
transformers.
"""
