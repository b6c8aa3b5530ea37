"""The quantizer is in transformers' tables whatever is imported first; a process per case, hence slow."""

from __future__ import annotations

import subprocess
import sys

import pytest

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__ == "rac_modifier.checkpoint.hf_quantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].__module__ == "rac_modifier.checkpoint.hf_quantizer"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import sys, rac_modifier; assert 'transformers' not in sys.modules; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import rac_modifier",
        "import transformers; import rac_modifier; transformers.AutoModelForCausalLM",
        "import rac_modifier.checkpoint.hf_quantizer",
        "import rac_modifier.checkpoint.load",
        "import rac_modifier, transformers.modeling_utils",
    ],
)
def test_registered_in_any_order_of_imports(imports: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{imports}\n{REGISTERED}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
