"""Where calibration and pruning meet llm-compressor: its pipelines with our loader, group by group or layer by layer."""

import llmcompressor  # noqa: F401 - first, since it registers our modifier when imported, and that imports these modules
