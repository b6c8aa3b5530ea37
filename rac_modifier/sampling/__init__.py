"""From prompts to completions: the model in this process or behind a server, and which model it is."""
