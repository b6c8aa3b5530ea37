"""A backend: three functions, the layer that they decide on, a decision with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.stored_weight import StoredWeight

VLLMS = "vLLM's own method"  # what runs a layer instead of a backend


@dataclass(frozen=True)
class Layer:
    """The numbers of a linear layer [rows, columns] that a backend decides on.

    Attributes:
        density: share of the weights that is stored, 0 to 1.
        encoding: of the stored values.
        served: dtype of the activations, and of the weight if it runs dense.
        group_bytes: bytes of the scale, and of the zero point if there is one, per row and group.
        two_of_four: at most two of each four neighbouring columns are stored.
        activation_bits: 16 or 8, to which an integer kernel may round activations.
    """

    rows: int
    columns: int
    density: float
    encoding: Encoding
    served: torch.dtype
    group_bytes: int = 4
    two_of_four: bool = False
    activation_bits: int = 16

    @classmethod
    def of(cls, weight: StoredWeight, served: torch.dtype) -> Self:
        """Read the numbers of a stored weight."""
        return cls(
            *(weight.rows, weight.columns, weight.density, weight.encoding, served),
            group_bytes=weight.group_bytes,
            two_of_four=weight.two_of_four,
            activation_bits=weight.activation_bits,
        )

    @property
    def group(self) -> int:
        """Return the columns that share a scale."""
        return self.encoding.group_size or self.columns


@dataclass(frozen=True)
class Decision:
    """How a layer runs: on a `kernel` or "dense", with the reason; bytes per weight of both."""

    sparse: bool
    kernel: str
    reason: str
    bytes_per_weight: float
    dense_bytes: float


def stay_dense(reason: str, served: torch.dtype, instead: str = "dense") -> Decision:
    """Return the decision "dense" for a reason that no backend was asked about, or `instead`."""
    nbytes = float(served.itemsize)
    return Decision(False, instead, f"{instead} because {reason}", nbytes, nbytes)


class Backend(Protocol):
    """The functions of a backend's package, which can be imported on every machine."""

    def can_run(self, layer: Layer) -> Decision:
        """Decide whether this machine runs the layer sparse and gains from it, with the reason."""
        ...

    def pack(self, weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors that `linear` reads, by parameter name, of a layer that `can_run`."""
        ...

    def linear(
        self,
        x: Tensor,
        packed: Mapping[str, Tensor],
        rows: int,
        columns: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return x [..., columns] W^T + bias [rows] in the dtype of x, also under torch.compile."""
        ...
