"""With the real llm-compressor: a recipe finds both modifiers, whichever module is imported first."""

from __future__ import annotations

import pytest

from tests.import_orders import last_lines

ORDERS = [
    "import llmcompressor, rac_modifier",
    "import rac_modifier, llmcompressor",
    "from rac_modifier import ReasoningAwareSparseGPTModifier",
    "import rac_modifier.llmcompressor.pipeline",
    "import rac_modifier.llmcompressor.targets",
]
MAKE_BOTH = """
from llmcompressor.modifiers import ModifierFactory
pruning = ModifierFactory.create("ReasoningAwareSparseGPTModifier", True, True, mask_structure="2:4")
calibration = ModifierFactory.create("ReasoningAwareCalibrationModifier", True, True)
print(type(pruning).__module__, type(calibration).__module__)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return last_lines([f"{order}\n{MAKE_BOTH}" for order in ORDERS])


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_both_modifiers_are_registered(printed, order):
    room = "rac_modifier.llmcompressor"
    assert (
        printed[f"{order}\n{MAKE_BOTH}"] == f"{room}.pruning_modifier {room}.calibration_modifier"
    )
