"""Benchmarks (`python -m bench --list`); they write results/*.json, which the docs render."""
