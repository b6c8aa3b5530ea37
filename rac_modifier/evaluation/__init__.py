"""Whether a pruned model still reasons: accuracy, endings, lengths, divergence."""
