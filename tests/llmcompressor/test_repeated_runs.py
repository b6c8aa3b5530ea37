"""Several `oneshot` calls in one process: nothing of a run that has ended stays but the last session's."""

import gc
import warnings

from llmcompressor import oneshot
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from tests.tiny import entry


def live_bytes() -> int:
    """The bytes of all tensors of this process, storages once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy attributes of some modules warn
        # not subclasses: fake tensors of other tests have no memory
        tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_five_calls_hold_no_more_than_the_first(tiny_folder, trace_store):
    held = []
    for _ in range(5):
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        size = sum(weight.untyped_storage().nbytes() for weight in model.parameters())
        oneshot(model=model, recipe=ReasoningAwareSparseGPTModifier(**entry(trace_store)))
        del model
        held.append(live_bytes())
    assert max(held) < held[0] + 0.3 * size, (held, size)
