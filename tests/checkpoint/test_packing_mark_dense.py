from __future__ import annotations

import json

import pytest

from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import mark_dense
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import Q, Saved, config_of, contents, same_bits


def test_mark_dense_stays_loadable_by_stock_transformers(saved: Saved) -> None:
    from transformers import AutoModelForCausalLM

    folder, expected, modules = saved(packed=False)
    config = config_of(folder)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {"format": "dense", "targets": ["Linear"]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / "model.safetensors").read_bytes()
    mark_dense(folder, modules)
    marked = config_of(folder)
    assert "quantization_config" not in marked
    assert marked["rac_sparsity"] == {"storage": "dense", "modules": modules}
    assert (folder / "model.safetensors").read_bytes() == weights
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_model(folder)):
        assert all(same_bits(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_mark_dense_checks_the_pattern(saved: Saved) -> None:
    folder, _, modules = saved("unstructured", packed=False)
    before = contents(folder)
    with pytest.raises(RacError, match="break 2:4"):
        mark_dense(folder, dict.fromkeys(modules, "2:4"))
    with pytest.raises(RacError, match="cannot hold 3:5"):
        mark_dense(folder, {Q: "3:5"})
    with pytest.raises(RacError, match=r"nowhere\.weight"):
        mark_dense(folder, {"nowhere": "2:4"})
    assert contents(folder) == before
