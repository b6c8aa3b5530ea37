"""A layer's numbers, and decisions as values."""

import torch

from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.stored_weight import from_dense
from rac_modifier.kernels.interface import Decision, Layer, stay_dense


def test_values():
    dense = torch.zeros(4, 8, dtype=torch.bfloat16)
    dense[:, ::4] = 1
    layer = Layer(4, 8, 0.25, Encoding("bfloat", 16), torch.float32, two_of_four=True)
    assert Layer.of(from_dense(dense, "a"), torch.float32) == layer
    decision = stay_dense("it is small", torch.float32)
    assert decision == Decision(False, "dense", "dense because it is small", 4.0, 4.0)
