"""The loss that the ablations rank models by."""

import pytest
import torch

from benchmarks.trace_loss import trace_loss
from rac_modifier.errors import RacError
from tests.tiny import tiny_model


def reference_loss(model, sequences):
    total, count = 0.0, 0
    for ids, prompt_length in sequences:
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(prompt_length, len(ids)):
            total -= logits[position - 1, ids[position]].item()
            count += 1
    return total / count


def test_trace_loss_against_one_sequence_at_a_time():
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    sequences = [
        (torch.randint(0, 300, (length,), generator=generator).tolist(), prompt)
        for length, prompt in [(2, 1), (40, 3), (17, 16), (5, 1), (33, 20)]
    ]
    expected = reference_loss(model, sequences)
    for batch_tokens in (1, 64, 4096):
        assert trace_loss(model, sequences, batch_tokens) == pytest.approx(expected, rel=1e-5)


def test_trace_loss_leaves_the_model_in_its_mode():
    model = tiny_model().train()
    trace_loss(model, [([1, 2, 3], 1)])
    assert model.training


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "no sequences"),
        ([([1, 2], 0)], "prompt_length 0"),
        ([([1, 2], 2)], "prompt_length 2 .* of 2 tokens"),
    ],
)
def test_trace_loss_bad_input(sequences, message):
    with pytest.raises(RacError, match=message):
        trace_loss(tiny_model(), sequences)
