"""The calibration set: a token budget, its mixture of traces, prompts and text, the loader.

A `Trace` of the store is an id and a length in `TracePool` if it is selected, a
`CalibrationSequence` if it is drawn, and a row with token weights in `CalibrationLoader`.
"""
