"""What is calibrated on: settings, mixture, batches, and their way into llm-compressor's pipelines."""
