from typing import get_args

from rac_modifier.cli.options import Dtype, PresetName
from rac_modifier.settings.presets import PRESETS, Preset


def test_the_presets_of_the_command_line_are_those_of_the_settings():
    assert {preset.value for preset in PresetName} == set(PRESETS) == set(get_args(Preset))


def test_precisions_are_dtypes_of_torch_or_auto():
    import torch

    assert all(
        precision == "auto" or isinstance(getattr(torch, precision), torch.dtype)
        for precision in Dtype
    )
