"""The tiny model, dense and pruned."""

import pytest
from llmcompressor import oneshot
from tiny import entry
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier


@pytest.fixture
def dense(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


@pytest.fixture
def prune(tiny_folder, trace_store):
    """Run oneshot on the tiny model with a recipe of ours, changed by `settings`."""

    def prune(model=None, later=(), pipeline="independent", output_dir=None, oneshot_options=None, **settings):
        modifiers = [ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings)), *later]
        return oneshot(
            model=str(tiny_folder) if model is None else model,
            recipe=modifiers,
            pipeline=pipeline,
            output_dir=None if output_dir is None else str(output_dir),
            **(oneshot_options or {}),
        )

    return prune
