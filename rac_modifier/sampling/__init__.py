"""From prompts to completions: the model in this process or on a server, its identity."""
