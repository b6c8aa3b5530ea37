"""With the real llm-compressor: a recipe finds both modifiers, whichever module is imported first."""

import subprocess
import sys

import pytest

MAKE_BOTH = """
from llmcompressor.modifiers import ModifierFactory
pruning = ModifierFactory.create("ReasoningAwareSparseGPTModifier", True, True, mask_structure="2:4")
calibration = ModifierFactory.create("ReasoningAwareCalibrationModifier", True, True)
print(type(pruning).__module__, type(calibration).__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "import llmcompressor, rac_modifier",
        "import rac_modifier, llmcompressor",
        "from rac_modifier import ReasoningAwareSparseGPTModifier",
        "import rac_modifier.llmcompressor.pipeline",
        "import rac_modifier.llmcompressor.targets",
    ],
)
def test_both_modifiers_are_registered(order):
    done = subprocess.run([sys.executable, "-c", f"{order}\n{MAKE_BOTH}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    room = "rac_modifier.llmcompressor"  # llm-compressor logs to standard output, so only the last line counts
    assert done.stdout.strip().splitlines()[-1] == f"{room}.pruning_modifier {room}.calibration_modifier"
