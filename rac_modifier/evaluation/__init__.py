"""Whether a pruned model still reasons: accuracy, thinking length, unfinished answers, and divergence from the dense model."""
