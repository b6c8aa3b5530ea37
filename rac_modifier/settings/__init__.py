"""What a user can set: pydantic models only, without torch, transformers or llm-compressor."""
