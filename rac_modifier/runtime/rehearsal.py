"""Count the memory of work before it runs: its own code, on fake tensors or a narrow problem."""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WIDTH = 512  # inputs of the narrower of two rehearsed problems


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages that operators create while they live: `now` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {
            id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        outputs = [result] if isinstance(result, Tensor) else tree_leaves(result)
        for tensor in outputs:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = id(storage)
                if key not in self._storages and key not in inputs:
                    reference = weakref.ref(storage, partial(self._forget, key))
                    self._storages[key] = reference, storage.nbytes()
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, _: object) -> None:
        self.now -= self._storages.pop(key)[1]


def widened_peak(rehearse: Callable[[int], int], columns: int, multiple: int = 1) -> int:
    """Return the peak bytes of `rehearse(columns)`, from two smaller widths: a w^2 + b w."""
    narrow = max(_WIDTH // multiple, 1) * multiple
    if columns <= 2 * narrow:
        return rehearse(columns)
    small, large = rehearse(narrow), rehearse(2 * narrow)
    a = (large - 2 * small) / (2 * narrow**2)
    b = (4 * small - large) / (2 * narrow)
    return int(a * columns**2 + b * columns)


@contextlib.contextmanager
def without_data(model: Any, **options: Any) -> Iterator[Any]:
    """Yield a copy of a transformers model with fake tensors, like all new ones meanwhile."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it logs a traceback before the error is raised
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            config = copy.deepcopy(model.config)
            yield type(model)._from_config(config, dtype=model.dtype, **options).eval()
    finally:
        log.disabled = before
