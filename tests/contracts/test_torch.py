"""What this package takes for granted about parts of torch that are not public, one test per
seam."""

from __future__ import annotations

import weakref

import torch


def test_seam_fake_tensors_run_a_layer_forward_and_back_without_memory():
    """recovery/simulated_step.py: shapes and sizes are those of real tensors, and a buffer that is
    real may take part."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    real = torch.ones(5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.empty(5, 1 << 20))
        result = torch.zeros(3, 1 << 20) @ weight.T + real
        result.sum().backward()
    assert result.shape == (3, 5)
    assert isinstance(weight.grad, FakeTensor)
    assert weight.grad.untyped_storage().nbytes() == 4 * 5 * (1 << 20)


def test_seam_a_dispatch_mode_sees_operators_and_storages_that_end():
    """recovery/simulated_step.py adds up storages by their identity, and takes them off when a weak
    reference ends."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen, gone = list[str](), list[bool]()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            seen.append(func.name())
            return result

    with Mode():
        made = torch.ones(4) + 1
    assert "aten::add.Tensor" in seen
    storage, view = made.untyped_storage(), made.view(2, 2)
    assert view.untyped_storage() is storage
    reference = weakref.ref(storage, lambda _: gone.append(True))
    del storage, view
    assert reference() is not None
    del made
    assert gone == [True]
