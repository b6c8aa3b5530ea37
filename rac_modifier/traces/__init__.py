"""Traces: a model's own chains of thought, sampled and stored as token ids."""
