"""cuSPARSELt that is not there: the two operators of torch, on the CPU, with a layout that has the bytes of the real one."""

from __future__ import annotations

import pytest
import torch
from rac_gpu import cusparselt, prompts
from torch import Tensor
from torch.nn.functional import one_hot

BF16 = torch.bfloat16


def compress(dense: Tensor) -> Tensor:
    """[rows, 9/16 columns]: two values of each four columns, then two places of two bits each."""
    assert dense.dtype == BF16
    rows, columns = dense.shape
    assert rows % 16 == columns % 16 == 0
    fours = dense.view(rows, -1, 4)
    assert bool((fours != 0).sum(dim=-1).le(2).all()), "more than two of four"
    places = (fours != 0).to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = fours.gather(-1, places).flatten(1)
    nibbles = (places[..., 0] | places[..., 1] << 2).view(rows, -1, 4)
    words = sum(nibbles[..., n] << 4 * n for n in range(4))
    metadata = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    return torch.cat([values, metadata.view(BF16)], dim=1)


def dense_of(compressed: Tensor) -> Tensor:
    """What was compressed."""
    rows, columns = len(compressed), compressed.shape[1] * 16 // 9
    values = compressed[:, : columns // 2].reshape(rows, -1, 2).float()
    words = compressed[:, columns // 2 :].contiguous().view(torch.int16).long() & 0xFFFF
    nibbles = torch.stack([words >> 4 * n & 15 for n in range(4)], dim=-1).view(rows, -1)
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
    return (one_hot(places, 4) * values.unsqueeze(-1)).sum(dim=-2).view(rows, columns)


def sparse_mm(
    compressed: Tensor, dense: Tensor, bias: Tensor | None = None, transpose_result: bool = False
) -> Tensor:
    """The product [rows, tokens], or its transpose, for tokens in columns of `dense`."""
    assert compressed.dtype == dense.dtype == BF16
    assert dense.shape[1] % 8 == 0
    assert transpose_result
    found = dense.t().float() @ dense_of(compressed).T
    return (found if bias is None else found + bias.float()).to(BF16)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for cuSPARSELt, and have torch provide it."""
    prompts.forget()
    monkeypatch.setenv(cusparselt.VARIABLE, "cusparselt")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
