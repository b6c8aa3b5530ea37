from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.files import INDEX_FILE
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    Saved,
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


@pytest.mark.parametrize(
    ("structure", "shard", "tied"),
    [("2:4", None, True), ("2:4", "60KB", False), ("unstructured", "60KB", True)],
)
def test_packed_folder(saved: Saved, structure: str, shard: str | None, tied: bool) -> None:
    folder, expected, modules = saved(structure, tied=tied, shard=shard)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 if shard else files == ["model.safetensors"]
    where, size = {}, 0
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
        for name, tensor in load_file(folder / file).items():
            where[name], size = file, size + tensor.nbytes
    parts = {"compressed", "bitmask", "shape"}
    parts |= {"row_offsets"} if structure == "unstructured" else set()
    for name in modules:
        assert {key.rpartition(".")[2] for key in where if key.startswith(f"{name}.")} == parts
    assert "model.layers.0.self_attn.o_proj.weight" in where
    assert ("lm_head.weight" in where) != tied
    assert_restores(folder, expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    quantization = config_of(folder)["quantization_config"]
    sparsity = quantization.pop("sparsity_config")
    assert quantization == {"format": "dense", "quant_method": "compressed-tensors"}
    assert sparsity.pop("global_sparsity") == pytest.approx(0.5, abs=0.02)
    assert sparsity == {
        "format": "sparse-24-bitmask" if structure == "2:4" else "sparse-bitmask",
        "sparsity_structure": structure,
        "targets": ["Linear"],
        "ignore": ["lm_head", "model.layers.0.self_attn.o_proj"],
    }
    if shard:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert (index["weight_map"], index["metadata"]["total_size"]) == (where, size)


@pytest.mark.parametrize("metadata", [None, {"total_size": None, "total_parameters": 3}])
def test_an_index_without_a_total_size_gets_one(saved: Saved, metadata: dict | None) -> None:
    """A valid index of other tools; the size is then that of the tensors."""
    folder, expected, modules = saved(shard="60KB", packed=False)
    index = json.loads((folder / INDEX_FILE).read_text()) | {"metadata": metadata}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    pack_checkpoint(folder, modules)
    actual = json.loads((folder / INDEX_FILE).read_text())["metadata"]
    sizes = [t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    assert actual == {**(metadata or {}), "total_size": sum(sizes)}
    assert_restores(folder, expected)


def test_one_format_for_a_mixed_checkpoint(tmp_path: Path) -> None:
    model = tiny_model()
    modules = {}
    for index, (name, linear) in enumerate(linears(model).items()):
        (prune_24 if index % 2 else prune_half)(linear.weight.data)
        modules[name] = "2:4" if index % 2 else "0:0"
    model.save_pretrained(tmp_path)
    assert pack_checkpoint(tmp_path, modules).format == "sparse-bitmask"
    config = config_of(tmp_path)
    assert config["quantization_config"]["sparsity_config"]["sparsity_structure"] == "unstructured"
    assert config["rac_sparsity"]["modules"] == {
        n: s.replace("0:0", "unstructured") for n, s in modules.items()
    }
    assert_restores(tmp_path, model.state_dict())


def test_other_n_of_m_is_checked_and_stored_as_bitmask(tmp_path: Path) -> None:
    model = tiny_model()
    weight = linears(model)[Q].weight.data
    weight.view(-1, 8)[:, [0, 2, 5]] = 0
    model.save_pretrained(tmp_path)
    with pytest.raises(RacError, match=rf"{Q}: \d+ groups break 4:8"):
        pack_checkpoint(tmp_path, {Q: "4:8"})
    assert pack_checkpoint(tmp_path, {Q: "3:8"}).format == "sparse-bitmask"
    assert_restores(tmp_path, model.state_dict())


def test_mark_dense_stays_loadable_by_stock_transformers(saved: Saved) -> None:
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
    ("modules", "dense", "message"),
    [
        ({}, [], "no modules to pack"),
        ({"model.nothing": "2:4"}, [], r"model\.nothing\.weight: not in"),
        ({Q: "5:4"}, [], 'mask_structure "5:4": prunes 5 of every 4'),
        ({Q: "dense"}, [], "mask_structure 'dense': not of the form"),
        ({Q: "2:4"}, [Q], "named both"),
        ({"model.norm": "2:4"}, [], r"model\.norm: shape \[64\]"),
        ({"model.layers.0.self_attn.o_proj": "2:4"}, [], "more than 2 nonzeros"),
        ({Q: "2:4", "model.layers.0.self_attn.o_proj": "2:4"}, [], "more than 2 nonzeros"),
    ],
)
def test_refusals_leave_the_folder_as_it_was(
    saved: Saved, modules: dict[str, str], dense: list[str], message: str
) -> None:
    folder, _, _ = saved(packed=False, shard="60KB")
    before = contents(folder)
    with pytest.raises(RacError, match=message):
        pack_checkpoint(folder, modules, dense)
    assert contents(folder) == before


def test_weights_of_few_bits_are_refused_with_a_way_out(saved: Saved) -> None:
    folder, _, _ = saved(packed=False)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{Q}.weight_packed"] = torch.zeros(8, 8, dtype=torch.int32)
    del tensors[f"{Q}.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RacError, match="store it dense"):
        pack_checkpoint(folder, {Q: "2:4"})
    mark_dense(folder, {Q: "2:4"})
    assert config_of(folder)["rac_sparsity"] == {"storage": "dense", "modules": {Q: "2:4"}}
