"""What a run of llm-compressor on a tiny model imports late, for the fork server."""

import transformers.models.qwen3.modeling_qwen3  # noqa: F401
from llmcompressor.modifiers import ModifierFactory

import rac_modifier.llmcompressor.pruning_modifier  # noqa: F401

ModifierFactory.refresh()  # imports every modifier
