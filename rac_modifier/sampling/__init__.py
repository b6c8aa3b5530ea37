"""Engines: what completes prompts, the model in this process or a server that holds it."""
