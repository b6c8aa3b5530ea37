"""Teacher forcing, KL divergence and intervals."""
