"""The layers that vLLM runs: everything here imports vLLM, and nothing outside this folder does but `plugin.register`."""
