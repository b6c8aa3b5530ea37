"""A backend: three functions, the layer that they decide on, a decision with its reason."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from rac_modifier.formats.stored_weight import StoredWeight

VLLMS = "vLLM's own method"  # what runs a layer instead of a backend
REORDERED = "its columns are reordered (desc_act)"  # why a layer stays dense
EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a module of a routed expert


@dataclass(frozen=True)
class Layer:
    """The numbers of a linear layer [rows, columns] that a backend decides on.

    Attributes:
        density: share of the weights that is stored, 0 to 1.
        stored: dtype of the stored values; int32 for words of values of `word_bits` bits.
        served: dtype of the activations, and of the weight if it runs dense.
        group: columns that share a scale.
        group_bytes: bytes of the scale, and of the zero point if there is one, per row and group.
        two_of_four: at most two of each four neighbouring columns are stored.
        activation_bits: 16 or 8, to which an integer kernel may round activations.
        word_bits: 4; without a mask also 3 or 2.
    """

    rows: int
    columns: int
    density: float
    stored: torch.dtype
    served: torch.dtype
    group: int
    group_bytes: int = 4
    two_of_four: bool = False
    zero_points: bool = False
    activation_bits: int = 16
    word_bits: int = 4

    @classmethod
    def of(cls, weight: StoredWeight, served: torch.dtype) -> Self:
        """Read the numbers of a stored weight."""
        return cls(
            weight.rows,
            weight.columns,
            weight.density,
            torch.int32 if weight.bits < 8 else weight.values.dtype,
            served,
            weight.group,
            weight.group_bytes,
            two_of_four=weight.two_of_four,
            zero_points=weight.zeros is not None,
            activation_bits=weight.activation_bits,
            word_bits=weight.bits if weight.bits < 8 else 4,
        )


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
