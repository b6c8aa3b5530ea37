"""The pruning entry: what is refused before sampling, and what runs leave in memory."""

import gc
import warnings

import pytest
from llmcompressor import oneshot
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, ReasoningAwareSparseGPTModifier
from tests.llmcompressor.conftest import BUILD, fp8, int8_head
from tests.llmcompressor.modifier_helpers import gptq_w4, int4
from tests.tiny import entry


class Sampling(Exception):  # noqa: N818 - not an error
    """Sampling has begun: nothing was refused."""


@pytest.fixture
def refused_or_sampled(tiny_folder, trace_store, monkeypatch):
    """Run a recipe of modifiers around ours up to where it would sample."""

    def sample(*args, **kwargs):
        raise Sampling

    monkeypatch.setattr(BUILD, sample)

    def run(*before, later=(), pipeline="independent", **settings):
        ours = ReasoningAwareSparseGPTModifier(**entry(trace_store, **settings))
        oneshot(model=str(tiny_folder), recipe=[*before, ours, *later], pipeline=pipeline)

    return run


def spin(*rotations: str) -> SpinQuantModifier:
    return SpinQuantModifier(rotations=list(rotations) or ["R1", "R2"])


INT4 = {"quantization": int4()}
RECOVER = {"recover": {"tokens": 600, "held_out_tokens": 150}}


@pytest.mark.parametrize(
    ("before", "later", "settings", "says"),
    [
        ([], [gptq_w4], {}, r"GPTQModifier after .* fills pruned weights again; .*quantization: {"),
        ([], [fp8, gptq_w4], {}, "GPTQModifier after"),
        ([fp8], [gptq_w4], {}, "GPTQModifier after"),
        ([gptq_w4], [], {}, None),
        ([fp8, gptq_w4], [fp8], {}, None),
        ([], [fp8], {"quantization": {"scheme": "W8A16"}}, "after .* quantizes twice"),
        ([], [fp8], RECOVER, "after .* its scales before recover trains .*; .*quantization: {"),
        ([], [int8_head], INT4 | RECOVER, None),
        ([], [SmoothQuantModifier, fp8], {}, None),
        ([], [SmoothQuantModifier], INT4, "SmoothQuantModifier after .* that are rounded"),
        ([spin], [], INT4, None),
        ([], [spin], {}, "SpinQuantModifier after .* rotates its weights; write it first"),
        ([lambda: spin("R1", "R4")], [], {}, "rotations: R4 rotates activations"),
        ([], [QuIPModifier], {}, "QuIPModifier with rotations: v rotates activations"),
        ([spin], [], RECOVER, "recover next to SpinQuantModifier, which rotates the head"),
        ([], [lambda: ReasoningAwareSparseGPTModifier(**entry())], {}, "write one, with targets"),
        ([], [fp8], {"pipeline": "sequential"}, "pruning needs its own; use pipeline='independ"),
        ([], [], {"pipeline": "sequential"}, None),
    ],
)
def test_what_other_modifiers_may_be_next_to_ours(
    refused_or_sampled, before, later, settings, says
):
    with pytest.raises(RacError if says else Sampling, match=says):
        refused_or_sampled(*(m() for m in before), later=[m() for m in later], **settings)


def live_bytes() -> int:
    """The bytes of all tensors of this process, storages once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy attributes of some modules warn
        # not subclasses: fake tensors of other tests have no memory
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_three_calls_hold_no_more_than_the_first(tiny_folder, trace_store):
    """Nothing of a run that has ended stays but the last session's."""
    held = []
    for _ in range(3):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        size = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
        settings = entry(trace_store, preset="paper", solver="magnitude")
        oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**settings))
        del model
        held.append(live_bytes())
    assert max(held) < held[0] + 0.3 * size, (held, size)
