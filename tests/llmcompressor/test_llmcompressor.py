"""Recipes find both modifiers, and transformers the quantizer, whatever is imported first."""

import pytest

from tests.import_orders import last_lines

QUANTIZER = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
print(*(table["compressed-tensors"].__module__ for table in tables))
"""
BOTH_MODIFIERS = """
name = "ReasoningAwareSparseGPTModifier"
from llmcompressor.modifiers import ModifierFactory
pruning = ModifierFactory.create(name, True, True, mask_structure="2:4")
calibration = ModifierFactory.create("ReasoningAwareCalibrationModifier", True, True)
print(type(pruning).__module__, type(calibration).__module__)
"""
IN_TRANSFORMERS = " ".join(["rac_modifier.checkpoint.hf_quantizer"] * 2)
PACKAGE = "rac_modifier.llmcompressor"
IN_LLMCOMPRESSOR = f"{PACKAGE}.pruning_modifier {PACKAGE}.calibration_modifier"
PRINTED = {
    f"import llmcompressor, rac_modifier\n{BOTH_MODIFIERS}": IN_LLMCOMPRESSOR,
    f"import rac_modifier, llmcompressor\n{BOTH_MODIFIERS}": IN_LLMCOMPRESSOR,
    f"from rac_modifier import ReasoningAwareSparseGPTModifier\n{BOTH_MODIFIERS}": (
        IN_LLMCOMPRESSOR
    ),
    f"import rac_modifier.llmcompressor.pipeline\n{BOTH_MODIFIERS}": IN_LLMCOMPRESSOR,
    "import sys, rac_modifier; assert 'transformers' not in sys.modules; "
    f"from transformers import AutoModelForCausalLM\n{QUANTIZER}": IN_TRANSFORMERS,
    f"from transformers import AutoModelForCausalLM; import rac_modifier\n{QUANTIZER}": (
        IN_TRANSFORMERS
    ),
    "import transformers; import rac_modifier; transformers.AutoModelForCausalLM\n"
    f"{QUANTIZER}": IN_TRANSFORMERS,
    f"import rac_modifier.checkpoint.hf_quantizer\n{QUANTIZER}": IN_TRANSFORMERS,
}


@pytest.mark.slow
def test_modifiers_and_the_quantizer_are_registered_in_any_order_of_imports():
    for program, line in last_lines(list(PRINTED)).items():
        assert line == PRINTED[program], program
