"""Prompts times 2:4 weights on cuSPARSELt, through torch: who asks for it, its copy of a weight, and the product.

Never run on a GPU. Off unless RAC_GPU_PROMPTS=cusparselt: the copy has 0.56 times the bytes of the dense weight, and is kept
beside the packed one, which few tokens need.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_modifier.errors import RacError

VARIABLE = "RAC_GPU_PROMPTS"
CHOICES = ("expand", "cusparselt")
_MULTIPLE = 16  # of the rows and columns of a bfloat16 weight, and
_TOKENS = 8  # of tokens: torch's `_DTYPE_SHAPE_CONSTRAINTS` for cuSPARSELt


def requested() -> bool:
    """Return whether the environment asks for cuSPARSELt.

    Raises:
        RacError: another value, or a torch or setting with which it cannot have an effect.
    """
    value = os.environ.get(VARIABLE) or CHOICES[0]
    if value not in CHOICES:
        raise RacError(
            f'{VARIABLE}="{value}": use expand or cusparselt, or unset it; expand is the default'
        )
    if value == "expand":
        return False
    if batch_invariant():
        raise RacError(
            f"{VARIABLE}=cusparselt: with VLLM_BATCH_INVARIANT one kernel multiplies every number "
            "of tokens; unset one of the two"
        )
    if not torch.backends.cusparselt.is_available():
        raise RacError(
            f"{VARIABLE}=cusparselt: torch {torch.__version__} has no cuSPARSELt; install torch for "
            "CUDA, or unset it"
        )
    return True


def batch_invariant() -> bool:
    """Whether vLLM asks for sums whose order does not depend on the number of tokens."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")


def problem(rows: int, columns: int) -> str | None:
    """Why cuSPARSELt does not take a weight of this shape."""
    fits = rows % _MULTIPLE == columns % _MULTIPLE == 0
    return None if fits else f"cuSPARSELt takes multiples of {_MULTIPLE}, not [{rows}, {columns}]"


def compress(dense: Tensor, place: torch.device) -> Tensor:
    """The copy of a 2:4 weight [rows, columns] in bfloat16, on a device: [rows, about 9/16 of the columns].

    Raises:
        RacError: cuSPARSELt refuses it, or too little memory.
    """
    try:
        return torch._cslt_compress(dense.to(place))
    except torch.OutOfMemoryError as error:
        raise RacError(
            f"the copy of a weight {list(dense.shape)} for cuSPARSELt does not fit into the GPU's memory; unset {VARIABLE}"
        ) from error
    except RuntimeError as error:
        raise RacError(f"cuSPARSELt: {str(error).splitlines()[0]}; unset {VARIABLE}") from error


def product(x: Tensor, compressed: Tensor, bias: Tensor | None) -> Tensor:
    """X [tokens, columns] times the transposed weight, plus bias [rows]: [tokens, rows]. One algorithm for every call: the first.

    Raises:
        RacError: cuSPARSELt refuses it.
    """
    tokens = len(x)
    padded = pad_zeros(x, (0, 0, 0, -tokens % _TOKENS)) if tokens % _TOKENS else x
    try:
        out = torch._cslt_sparse_mm(
            compressed,
            padded.t(),
            bias=None if bias is None else bias.contiguous(),
            transpose_result=True,
        )
    except RuntimeError as error:
        raise RacError(f"cuSPARSELt: {str(error).splitlines()[0]}; unset {VARIABLE}") from error
    return out[:tokens].contiguous()
