"""Saved models; nothing is re-exported, so that serving imports no transformers."""
