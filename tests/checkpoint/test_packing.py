from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint.files import INDEX_FILE, TensorFiles
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.checkpoint.quantization_config import to_words
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    Saved,
    assert_restores,
    config_of,
    contents,
    dense_tensors,
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
    names: set[str] = set()
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            names |= set(tensors.keys())
        assert stat.S_IMODE((folder / file).stat().st_mode) == 0o644
    parts = {"compressed", "bitmask", "shape"} | (
        {"row_offsets"} if structure == "unstructured" else set()
    )
    for name in modules:
        assert {
            part for part in (*parts, "row_offsets", "weight") if f"{name}.{part}" in names
        } == parts
    assert "model.layers.0.self_attn.o_proj.weight" in names
    assert ("lm_head.weight" in names) != tied
    assert_restores(folder, expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    quantization = config_of(folder)["quantization_config"]
    sparsity = quantization["sparsity_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["format"] == "dense"
    assert sparsity["format"] == ("sparse-24-bitmask" if structure == "2:4" else "sparse-bitmask")
    assert sparsity["sparsity_structure"] == structure
    assert sparsity["targets"] == ["Linear"]
    assert sparsity["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert sparsity["global_sparsity"] == pytest.approx(0.5, abs=0.02)
    if shard:
        index = json.loads((folder / INDEX_FILE).read_text())
        assert set(index["weight_map"]) == names
        sizes = 0
        for file in files:
            for name, tensor in load_file(folder / file).items():
                assert index["weight_map"][name] == file
                sizes += tensor.nbytes
        assert index["metadata"]["total_size"] == sizes
        assert index["metadata"]["total_parameters"] == sum(
            tensor.numel()
            for name, tensor in expected.items()
            if not (tied and name == "lm_head.weight")
        )


@pytest.mark.parametrize("metadata", [None, {}, {"total_size": None}, {"total_parameters": 3}])
def test_an_index_without_a_total_size_gets_one(saved: Saved, metadata: dict | None) -> None:
    """A valid index of other tools; the size is then that of the tensors."""
    folder, expected, modules = saved(shard="60KB", packed=False)
    index = json.loads((folder / INDEX_FILE).read_text())
    if metadata is None:
        del index["metadata"]
    else:
        index["metadata"] = metadata
    (folder / INDEX_FILE).write_text(json.dumps(index))
    pack_checkpoint(folder, modules)
    found = json.loads((folder / INDEX_FILE).read_text())["metadata"]
    sizes = [t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values()]
    assert found == {**(metadata or {}), "total_size": sum(sizes)}
    assert_restores(folder, expected)


def test_sparsity_config_is_what_compressed_tensors_parses(saved: Saved) -> None:
    config = pytest.importorskip("compressed_tensors.config")
    for structure in ("2:4", "unstructured"):
        folder, _, _ = saved(structure)
        raw = config_of(folder)["quantization_config"]["sparsity_config"]
        parsed = config.SparsityCompressionConfig.load_from_registry(raw["format"], **raw)
        assert config.SparsityStructure(parsed.sparsity_structure).value == structure
        for path in folder.iterdir():
            path.unlink()


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


def test_what_quantisation_wrote_is_kept(saved: Saved) -> None:
    folder, _, modules = saved(packed=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in modules:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.ones(len(tensors[f"{name}.weight"]), 1)
    save_file(tensors, file, metadata={"format": "pt"})
    before = {
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
        },
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "quant_method": "compressed-tensors",
        "sparsity_config": {},
    }
    config = config_of(folder) | {"quantization_config": before}
    (folder / "config.json").write_text(json.dumps(config))
    pack_checkpoint(folder, modules, ["lm_head"])
    after = config_of(folder)["quantization_config"]
    assert after.pop("sparsity_config")["format"] == "sparse-24-bitmask"
    assert after == {key: value for key, value in before.items() if key != "sparsity_config"}
    assert_restores(folder, tensors)
    assert load_file(file)[f"{Q}.compressed"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [12, 68])  # no multiple of a word's values
def test_words_of_a_quantized_weight_are_packed_and_come_back(
    tmp_path: Path, bits: int, columns: int
) -> None:
    weight = torch.randint(1, 8, (5, columns), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    prune_24(weight)
    tensors = {
        **{f"{Q}.{part}": value for part, value in to_words(weight, bits).items()},
        f"{Q}.weight_scale": torch.ones(5, 1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "type": "int", "strategy": "channel"},
    }
    config = {
        "format": "pack-quantized",
        "quant_method": "compressed-tensors",
        "config_groups": {"g": group},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    (before,) = inspect_checkpoint(tmp_path).modules
    assert (before.columns, before.dtype, before.stored, before.sparsity) == (
        columns,
        f"I{bits}",
        "words",
        0.5,
    )
    dense_bytes = sum(tensors[f"{Q}.{part}"].nbytes for part in ("weight_packed", "weight_shape"))
    assert pack_checkpoint(tmp_path, {Q: "2:4"}).dense_bytes == dense_bytes
    with TensorFiles(tmp_path) as files:
        assert files.dtype(f"{Q}.compressed") == (torch.int32 if bits == 4 else torch.int8)
        assert f"{Q}.weight_shape" not in files
    found = dense_tensors(tmp_path)
    assert found.keys() == {f"{Q}.weight", f"{Q}.weight_scale"}
    assert torch.equal(found[f"{Q}.weight"], weight)
    assert torch.equal(found[f"{Q}.weight_scale"], tensors[f"{Q}.weight_scale"])
    (after,) = inspect_checkpoint(tmp_path).modules
    assert (after.columns, after.dtype, after.pattern_ok) == (columns, f"I{bits}", True)


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
