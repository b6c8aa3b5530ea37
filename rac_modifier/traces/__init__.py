"""Traces, a model's chains of thought as token ids: store, fill, select, report."""
