"""A packed model that other people's harnesses measure."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import pack_model
from rac_modifier.reasoner import reasoner_path
from tests.tiny import linears


@pytest.fixture(scope="session")
def packed_reasoner(tmp_path_factory) -> Path:
    """The reasoner without the smallest 30 % of each layer's weights, packed; it still reasons."""
    folder = tmp_path_factory.mktemp("packed")
    model = AutoModelForCausalLM.from_pretrained(reasoner_path())
    for linear in linears(model).values():
        size = linear.weight.data.abs()
        linear.weight.data[size <= size.float().quantile(0.3)] = 0
    model.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(reasoner_path()).save_pretrained(folder / "dense")
    pack_model(plan_packing(folder / "dense"), folder / "packed", "reasoner")
    return folder / "packed"
