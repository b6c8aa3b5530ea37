"""Traces, a model's own chains of thought as token ids: the store, filling it, selecting from it, reporting on it."""
