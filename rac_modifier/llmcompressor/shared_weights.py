"""Share offloaded weights between the processes of each machine.

With several processes compressed-tensors keeps one copy of each weight, in the memory of one
machine. On several machines each has a copy, in memory that its own processes share.
"""

import torch
from compressed_tensors.distributed import get_source_rank
from compressed_tensors.offload.cache.dist_cpu import DistributedCPUCache
from compressed_tensors.offload.utils import to_tensor
from torch import Tensor

from rac_modifier.distributed.torchrun import present_processes


def share_on_each_machine() -> None:
    """Let compressed-tensors keep a copy of the weights on each machine of the run."""
    DistributedCPUCache.offload = _offload


@torch.no_grad()
def _offload(cache: DistributedCPUCache, tensor: Tensor | None) -> Tensor | None:
    """Return the source rank's tensor, in memory that the processes of a machine share."""
    if tensor is None:
        return None
    processes = present_processes()
    values = processes.send(tensor, get_source_rank()).cpu().contiguous()
    shape = values.shape
    if values.untyped_storage().nbytes() > values.nbytes:  # a part of merged experts
        values = values.clone()
    place = None
    if processes.rank == processes.machine:
        manager, name, size = values.share_memory_().untyped_storage()._share_filename_cpu_()
        place = [manager.decode(), name.decode(), size]
    manager, name, size = processes.from_all(place)[processes.machine]
    if processes.rank != processes.machine:
        storage = torch.UntypedStorage._new_shared_filename_cpu(
            manager.encode(), name.encode(), size
        )
        values = torch.empty(0, dtype=values.dtype).set_(storage)
    processes.wait()  # the first does not free it before the others have it
    return to_tensor(values.view(shape), tensor)
