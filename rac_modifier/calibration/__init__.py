"""The calibration set: a token budget, its mixture of traces, prompts and text, the loader."""
