"""Benchmarks of rac-modifier: `python -m bench --list` names the suites. They write results/*.json,
which the docs render."""
