"""Recipes find both modifiers, and transformers the quantizer, without an import of those.

tests/test_on_import.py has each order of imports, on a small library.
"""

import subprocess
import sys

import pytest

PROGRAM = """
import sys, rac_modifier
assert "transformers" not in sys.modules
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from llmcompressor.modifiers import ModifierFactory
for table in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
    print(table["compressed-tensors"].__module__)
name = "ReasoningAwareSparseGPTModifier"
print(type(ModifierFactory.create(name, True, True, mask_structure="2:4")).__module__)
name = "ReasoningAwareCalibrationModifier"
print(type(ModifierFactory.create(name, True, True)).__module__)
"""


@pytest.mark.slow
def test_modifiers_and_the_quantizer_are_registered_where_libraries_are_imported_later():
    command = [sys.executable, "-c", PROGRAM]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-4:] == [
        *["rac_modifier.checkpoint.hf_quantizer"] * 2,
        "rac_modifier.llmcompressor.pruning_modifier",
        "rac_modifier.llmcompressor.calibration_modifier",
    ]
