"""The room that meets llm-compressor: our modifiers, its pipelines with our loader, group by group or layer by layer."""

import llmcompressor  # noqa: F401 - first, since it registers our modifiers when imported, and that imports these modules
