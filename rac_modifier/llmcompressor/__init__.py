"""The room that meets llm-compressor: our modifiers, its pipelines with our loader, group by group or layer by layer."""
