"""What the settings know of compressed-tensors and llm-compressor without importing them."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as UPSTREAM
from llmcompressor.modifiers import Modifier
from pydantic import BaseModel

from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.quantization import ARGUMENT_NAMES, GROUP_NAMES, PRESET_SCHEMES, QUANTIZED_PARTS


def test_the_names_of_preset_schemes():
    """If this fails: write upstream's names into settings/quantization.py."""
    assert frozenset(UPSTREAM) == PRESET_SCHEMES


def test_the_settings_of_a_config_group():
    assert set(GROUP_NAMES) == set(QuantizationScheme.model_fields)
    assert set(ARGUMENT_NAMES) == set(QuantizationArgs.model_fields)
    of_arguments = {
        name for name, field in QuantizationScheme.model_fields.items() if "QuantizationArgs" in str(field.annotation)
    }
    assert set(QUANTIZED_PARTS) == of_arguments


def test_no_setting_has_the_name_of_something_that_upstreams_modifier_has():
    for entry in ENTRIES.values():
        own = _names_of(entry) - _names_of(BaseModel)
        assert not own & _names_of(Modifier)


def _names_of(model: type[BaseModel]) -> set[str]:
    return {name for name in {*dir(model), *model.model_fields} if not name.startswith("__") and name != "_abc_impl"}
