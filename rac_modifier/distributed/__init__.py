"""The ranks of a run, and the connections between machines."""
