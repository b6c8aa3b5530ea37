"""What a backend is: three functions, the layer that they decide on, and their decision as a value with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.errors import RacError

EXPERT = re.compile(r"\.experts\.\d+\.")  # in the name of a module of a routed expert


@dataclass(frozen=True)
class Layer:
    """The numbers of a linear layer [rows, columns] that a backend decides on.

    density: share of the weights that is stored, 0 to 1. stored: dtype of the stored values, int32 for words of
    values of `word_bits` bits: 4, or 3 or 2 of a weight without a mask. served: dtype of the activations, and of the weight if
    the layer runs dense. group: columns that share a scale.
    two_of_four: at most two of each four neighbouring columns are stored. zero_points: groups have one.
    group_bytes: bytes of the scale, and of the zero point if there is one, of a row and group. activation_bits: what a
    kernel of integers may round activations to, 16 or 8.

    Raises:
        RacError: sizes that are not positive, or a density outside of 0 to 1.
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

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or not 0.0 <= self.density <= 1.0:
            raise RacError(
                f"a weight [{self.rows}, {self.columns}] of density {self.density}: sizes must be positive and the density "
                "between 0 and 1; the checkpoint is damaged"
            )

    @classmethod
    def of(cls, weight: StoredWeight, served: torch.dtype) -> Layer:
        """The numbers of a stored weight."""
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
    """How a layer runs. `kernel` is its name, such as "sparse kernel avx2", or "dense"; `reason` is one readable line.

    bytes_per_weight: of the packed layout, masks and padding included, and scales that are shared by groups of columns; also
    where the decision is dense.
    dense_bytes: bytes per weight of the same layer stored dense in the dtype that it is served in.
    """

    sparse: bool
    kernel: str
    reason: str
    bytes_per_weight: float
    dense_bytes: float

    @property
    def ceiling(self) -> float:
        """The largest speed-up over the dense layer that reading fewer bytes can give."""
        return self.dense_bytes / self.bytes_per_weight


def stay_dense(reason: str, served: torch.dtype) -> Decision:
    """The decision "dense" for a reason that no backend was asked about."""
    return Decision(
        False, "dense", f"dense because {reason}", float(served.itemsize), float(served.itemsize)
    )


class Backend(Protocol):
    """The functions of a backend's package. It must be importable on every machine; `can_run` says what is missing."""

    def can_run(self, layer: Layer) -> Decision:
        """Whether this machine runs the layer sparse and gains from it, with the reason."""
        ...

    def pack(self, weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
        """The tensors that `linear` reads, by the names of the layer's parameters that hold them.

        Called where `can_run` said sparse; `served` is the dtype of the activations.
        """
        ...

    def linear(
        self,
        x: Tensor,
        packed: Mapping[str, Tensor],
        rows: int,
        columns: int,
        bias: Tensor | None = None,
    ) -> Tensor:
        """X [..., columns] times the transposed weight, plus bias [rows]: [..., rows] in x's dtype.

        `packed` is what `pack` returned. Must work under torch.compile.
        """
        ...
