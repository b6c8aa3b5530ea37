"""The bytes of tensors that are alive, counted by what operators return."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operators made and that are still alive, and their peak since
    `reset`."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = self.base = 0

    def reset(self) -> None:
        self.collect()
        self.base = self.peak = self.now

    def knows(self, tensor: torch.Tensor) -> None:
        """Count one that was made before."""
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.now += storage.nbytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.forget(storage._cdata)  # an address may be used again
                    self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.now += storage.nbytes()
        if self.now > self.peak:  # only then it matters which are still alive
            self.collect()
            self.peak = max(self.peak, self.now)
        return result

    def collect(self) -> None:
        for key in [key for key, (reference, _) in self.storages.items() if reference.expired()]:
            self.forget(key)

    def forget(self, key: int) -> None:
        self.now -= self.storages.pop(key, (None, 0))[1]
