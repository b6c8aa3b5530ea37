"""A recipe of the real llm-compressor finds both modifiers, whatever is imported first."""

import pytest

from tests.import_orders import last_lines

ORDERS = [
    "import llmcompressor, rac_modifier",
    "import rac_modifier, llmcompressor",
    "import rac_modifier, llmcompressor.modifiers",
    "from rac_modifier import ReasoningAwareSparseGPTModifier",
    "import rac_modifier.llmcompressor.pipeline",
    "import rac_modifier.llmcompressor.targets",
]
NAMES = """
import sys
print([name for name in sys.modules if name.startswith("rac_modifier.llmcompressor.")])
"""
MAKE_BOTH = """
from llmcompressor.modifiers import ModifierFactory
name = "ReasoningAwareSparseGPTModifier"
pruning = ModifierFactory.create(name, True, True, mask_structure="2:4")
calibration = ModifierFactory.create("ReasoningAwareCalibrationModifier", True, True)
print(type(pruning).__module__, type(calibration).__module__)
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return last_lines([*(f"{order}\n{MAKE_BOTH}" for order in ORDERS), f"{ORDERS[1]}\n{NAMES}"])


@pytest.mark.slow
def test_both_modifiers_are_registered_and_imported_when_they_are_made(printed):
    package = "rac_modifier.llmcompressor"
    for order in ORDERS:
        expected = f"{package}.pruning_modifier {package}.calibration_modifier"
        assert printed[f"{order}\n{MAKE_BOTH}"] == expected, order
    assert printed[f"{ORDERS[1]}\n{NAMES}"] == "[]"
