"""Does a pruned model still reason: accuracy, thinking length, unfinished answers and speed, next to dense."""
