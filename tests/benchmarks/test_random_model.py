"""The words of 3 bits of random_model.py are those of a checkpoint."""

from __future__ import annotations

import torch

from rac_modifier.checkpoint.int32_words import unpack_words
from tests.benchmarks.conftest import BENCHMARKS


def test_words_of_3_bits_are_those_of_a_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import random_model

    weight = torch.randn(7, 128)
    values, _ = random_model.rounded_groups(weight, 3)
    assert (int(values.min()), int(values.max())) == (-3, 3)
    assert torch.equal(unpack_words(random_model.pack_three(values), 3, 128), values)
