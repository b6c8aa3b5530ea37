import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    assert_restores,
    config_of,
    contents,
    edited_config,
    prune_24,
    prune_half,
    same_bits,
    tiny_model,
)
from tests.tiny import linears


def test_one_format_for_a_mixed_checkpoint(tmp_path):
    model = tiny_model()
    modules = {}
    for index, (name, linear) in enumerate(linears(model).items()):
        (prune_24 if index % 2 else prune_half)(linear.weight.data)
        modules[name] = "2:4" if index % 2 else "0:0"
    model.save_pretrained(tmp_path)
    assert pack_checkpoint(tmp_path, modules).format == "sparse-bitmask"
    config = config_of(tmp_path)
    recorded = {
        name: structure.replace("0:0", "unstructured") for name, structure in modules.items()
    }
    assert config["rac_sparsity"]["modules"] == recorded
    assert_restores(tmp_path, model.state_dict())


def test_other_n_of_m_is_checked_and_stored_as_bitmask(tmp_path):
    model = tiny_model()
    weight = linears(model)[Q].weight.data
    weight.view(-1, 8)[:, [0, 2, 5]] = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(RacError, match=rf"{Q}: \d+ groups break 4:8"):
        pack_checkpoint(tmp_path, {Q: "4:8"})
    assert pack_checkpoint(tmp_path, {Q: "3:8"}).format == "sparse-bitmask"
    assert_restores(tmp_path, model.state_dict())


def test_mark_dense_stays_loadable_by_stock_transformers(saved):
    folder, expected, modules = saved(packed=False)
    with edited_config(folder) as config:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": {"format": "dense", "targets": ["Linear"]},
        }
    weights = (folder / "model.safetensors").read_bytes()
    mark_dense(folder, modules)
    marked = config_of(folder)
    assert "quantization_config" not in marked
    assert marked["rac_sparsity"] == {"storage": "dense", "modules": modules}
    assert (folder / "model.safetensors").read_bytes() == weights
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_model(folder)):
        assert all(same_bits(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.nothing": "2:4"}, r"model\.nothing\.weight: not in"),
        ({Q: "5:4"}, 'mask_structure "5:4": prunes 5 of every 4'),
        ({"model.norm": "2:4"}, r"model\.norm: \[64\]"),
        ({Q: "2:4", "model.layers.0.self_attn.o_proj": "2:4"}, "more than 2 nonzeros"),
    ],
)
def test_refusals_leave_the_folder_as_it_was(saved, modules, message):
    folder, _, _ = saved(packed=False, shard="60KB")
    before = contents(folder)
    with pytest.raises(RacError, match=message):
        pack_checkpoint(folder, modules)
    assert contents(folder) == before


def test_weights_of_few_bits_are_refused_with_a_way_out(saved):
    folder, _, _ = saved(packed=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_packed"] = torch.zeros(8, 8, dtype=torch.int32)
    del tensors[f"{Q}.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RacError, match="store it dense"):
        pack_checkpoint(folder, {Q: "2:4"})
    mark_dense(folder, {Q: "2:4"})
    assert config_of(folder)["rac_sparsity"] == {"storage": "dense", "modules": {Q: "2:4"}}
