"""The quantizer is in transformers' tables whatever is imported first."""

from __future__ import annotations

import pytest

from tests.import_orders import last_lines

IMPORTS = [
    "import sys, rac_modifier; assert 'transformers' not in sys.modules; from transformers "
    "import AutoModelForCausalLM",
    "from transformers import AutoModelForCausalLM; import rac_modifier",
    "import transformers; import rac_modifier; transformers.AutoModelForCausalLM",
    "import rac_modifier.checkpoint.hf_quantizer",
    "import rac_modifier, transformers.modeling_utils",
]
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
print(*(table["compressed-tensors"].__module__ for table in tables))
"""


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return last_lines([f"{imports}\n{REGISTERED}" for imports in IMPORTS])


@pytest.mark.slow
@pytest.mark.parametrize("imports", IMPORTS)
def test_registered_in_any_order_of_imports(printed: dict[str, str], imports: str) -> None:
    ours = "rac_modifier.checkpoint.hf_quantizer"
    assert printed[f"{imports}\n{REGISTERED}"] == f"{ours} {ours}"
