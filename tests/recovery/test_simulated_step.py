"""What a step on tensors without data counts. Against bytes that live in a real run: test_memory.py."""

import torch

from rac_modifier.recovery.simulated_step import step_bytes
from tests.recovery.recovery_helpers import dense_and_sparse


def test_activations_grow_with_tokens_and_checkpointing_keeps_few_of_them():
    dense, _ = dense_and_sparse()

    def taken(length, checkpointing):
        return step_bytes(
            dense,
            1,
            length,
            length - 1,
            autocast=None,
            checkpointing=checkpointing,
            keep_gradients=False,
        )

    assert 1.8 * taken(100, False) < taken(200, False) < 2.2 * taken(100, False)
    assert taken(200, True) < 0.8 * taken(200, False)


def test_counting_leaves_the_model_as_it_is():
    dense, _ = dense_and_sparse()
    dense.to(torch.bfloat16)
    before = {name: (p, p.clone()) for name, p in dense.named_parameters()}
    step_bytes(dense, 2, 50, 90, autocast=torch.bfloat16, checkpointing=True)
    for name, p in dense.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.requires_grad
        assert p.grad is None


def test_a_second_batch_of_a_step_finds_the_gradients_of_the_first():
    dense, _ = dense_and_sparse()
    one, two = (
        step_bytes(dense, 1, 100, 99, autocast=None, checkpointing=False, micro_batches=n)
        for n in (1, 2)
    )
    assert one < two <= one + 4 * sum(p.numel() for p in dense.parameters())
