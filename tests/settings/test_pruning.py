from typing import get_args

import pytest

from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import PRESETS, Preset, PruningSettings


def test_a_preset_fills_in_what_is_not_set():
    settings = PruningSettings(sparsity=0.5, preset="fast", order="group")
    assert (settings.solver, settings.refit, settings.reconstruct, settings.order) == (
        "sparsegpt", True, "dense", "group",
    )  # fmt: skip
    paper = PruningSettings(sparsity=0.5, preset="paper", solver="wanda")
    assert (paper.solver, paper.reconstruct, paper.order) == ("wanda", "pruned", "layer")
    assert set(PRESETS) == set(get_args(Preset))


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"sparsity": 0.5}, Pattern.unstructured(0.5)),
        ({"sparsity": 0.5, "mask_structure": "0:0"}, Pattern.unstructured(0.5)),
        ({"mask_structure": "2:4"}, Pattern.n_of_m(2, 4)),
        ({"mask_structure": "2:4", "sparsity": None}, Pattern.n_of_m(2, 4)),
        ({"solver": "keep"}, None),
        ({"solver": "keep", "mask_structure": "0:0"}, None),
        ({"solver": "keep", "mask_structure": "4:8"}, Pattern.n_of_m(4, 8)),
    ],
)
def test_the_pattern(values, pattern):
    assert PruningSettings(**values).pattern == pattern


def test_one_target_is_a_list_of_one():
    settings = PruningSettings(sparsity=0.5, targets="Linear", ignore="lm_head")
    assert (settings.targets, settings.ignore) == (["Linear"], ["lm_head"])


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"solver": "alps"}, True),
        ({"solver": "keep"}, True),
        ({"solver": "sparsegpt"}, True),
        ({"solver": "wanda"}, False),
        ({"solver": "magnitude"}, False),
        ({"solver": "magnitude", "refit": True}, True),
        ({"solver": "wanda", "reconstruct": "dense", "order": "auto"}, True),
        ({"solver": "wanda", "quantization": {"scheme": "W8A8"}}, True),
    ],
)
def test_where_weights_are_fitted(values, fits):
    sparsity = {} if values["solver"] == "keep" else {"sparsity": 0.5}
    settings = PruningSettings(preset="paper", **sparsity, **values)
    assert settings.fits_weights == fits
