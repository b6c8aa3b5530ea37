"""Saved models: packed sparse weights, loading them, looking into them, and the records beside them.

Nothing is re-exported here, so that serving can import a module of this room without importing transformers.
"""
