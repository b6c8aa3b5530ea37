"""What the settings know of compressed-tensors and llm-compressor without importing them."""

from inspect import signature

import pytest
import torch
import yaml
from compressed_tensors.offload.cache.dist_cpu import DistributedCPUCache
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as UPSTREAM
from llmcompressor.modifiers import Modifier
from llmcompressor.recipe import Recipe
from pydantic import BaseModel, ValidationError

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.pruning import PRESET_SCHEMES
from rac_modifier.settings.recipe import CheckedRecipe
from tests.tiny import NAME

CALIBRATES = "ReasoningAwareCalibrationModifier"


def test_the_names_of_preset_schemes():
    """If this fails: write upstream's names into settings/pruning.py."""
    later = {"MXFP4XFP8", "MXFP6A16", "MXFP6A8"}  # of 0.20, which llm-compressor 0.14 refuses
    assert UPSTREAM.keys() - later == PRESET_SCHEMES


def test_seam_the_cache_of_several_processes_offloads_one_tensor():
    """If this fails: llmcompressor/upstream.py replaces this method."""
    assert [*signature(DistributedCPUCache.offload).parameters] == ["self", "tensor"]
    storage = torch.ones(3).share_memory_().untyped_storage()
    manager, name, size = storage._share_filename_cpu_()
    same = torch.UntypedStorage._new_shared_filename_cpu(manager, name, size)
    assert torch.empty(0).set_(same).tolist() == [1.0, 1.0, 1.0]


def test_no_setting_has_the_name_of_something_that_upstreams_modifier_has():
    for entry in ENTRIES.values():
        own = _names_of(entry) - _names_of(BaseModel)
        assert not own & _names_of(Modifier)


@pytest.mark.parametrize(
    ("name", "settings"), [(NAME, {"mask_structure": "2:4"}), (CALIBRATES, {})]
)
def test_a_modifiers_dump_is_a_recipe_entry(name, settings):
    """What llm-compressor writes into recipe.yaml beside a checkpoint."""
    recipe = Recipe.create_instance(yaml.safe_dump({"a_stage": {"a_modifiers": {name: settings}}}))
    written = yaml.safe_load(recipe.yaml())
    ours = CheckedRecipe(written, "recipe.yaml")
    actual, entry = ours.entry
    whole = ENTRIES[name](**settings).model_dump()
    assert actual == name
    assert entry == {key: value for key, value in whole.items() if value is not None}
    ours.check()
    Recipe.create_instance(yaml.safe_dump(written))


def test_upstreams_state_is_no_setting():
    for state in ({"start": 0}, {"initialized_": True}, {"requires_calibration_data": False}):
        with pytest.raises(
            ValidationError, match="has no effect in ReasoningAwareSparseGPTModifier; leave it out"
        ):
            ReasoningAwareSparseGPTModifier(sparsity=0.5, **state)


def _names_of(model: type[BaseModel]) -> set[str]:
    names = {*dir(model), *model.model_fields} - {"_abc_impl"}
    return {name for name in names if not name.startswith("__")}
