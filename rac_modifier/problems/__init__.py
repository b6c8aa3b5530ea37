"""The final answer in a reasoning model's text, and whether it is right."""
