"""The calibration set: a token budget, its mixture of traces, prompts and text, the weight of each token, the loader.

The way of a trace's tokens through this room: a `Trace` of the store -> in `TracePool` only its id and length, if it is kept
-> a `CalibrationSequence`, if it is drawn -> a row of a batch in `CalibrationLoader`, with a weight for each token.
"""
