"""Files, models, and what speeds up a CPU: below everything else."""
