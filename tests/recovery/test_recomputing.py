import copy

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.recomputing import decoder_layers, recomputing
from rac_modifier.settings.recovery import RecoverySettings
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, sequences
from tests.tiny import tiny_model

IDS = torch.arange(5, 37).view(2, 16)


def kept_bytes(model, enabled):
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with (
        recomputing(model, enabled),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
        size = sum(nbytes for pointer, nbytes in kept.items() if pointer not in own)
        loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return size, loss.detach(), gradients


def test_loss_and_gradients_are_the_same_and_less_is_kept():
    model = tiny_model(num_hidden_layers=4)
    plain, loss, gradients = kept_bytes(model, enabled=False)
    less, loss_again, gradients_again = kept_bytes(model, enabled=True)
    assert less < 0.6 * plain
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


def test_a_layer_runs_twice_with_a_gradient_and_once_without():
    model, calls = tiny_model(), []
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with recomputing(model):
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
        assert len(calls) == 2
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        assert len(calls) == 3
    model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert len(calls) == 4
    assert not any("forward" in vars(layer) for layer in decoder_layers(model, "x"))


def test_recovery_ends_with_the_same_bits():
    settings = RecoverySettings(learning_rate=3e-3, step_tokens=300, batch_tokens=400)
    dense, one = dense_and_sparse()
    other = copy.deepcopy(one)
    results = [
        recover(
            model,
            LiveTeacher(dense),
            sequences(40, seed=1),
            sequences(10, seed=2),
            settings.model_copy(update={"activation_checkpointing": enabled}),
            progress=False,
        )
        for model, enabled in ((one, False), (other, True))
    ]
    assert results[0].curve == results[1].curve
    assert [result.activation_checkpointing for result in results] == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_model_without_layers_is_refused():
    with (
        pytest.raises(
            RacError, match=r"Linear has no layers .* leave recover\.activation_checkpointing out"
        ),
        recomputing(torch.nn.Linear(2, 2)),
    ):
        pass
