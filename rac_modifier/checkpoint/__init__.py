"""The saved model: packed sparse weights, loading them back, looking into them, and the records that stand beside them.

Nothing is re-exported here, so that the serving side can import `bitmask` without importing transformers.
"""
