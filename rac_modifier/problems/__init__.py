"""Where questions come from, and whether an answer is right."""
