from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import linears, prune_24, prune_half, same_bits, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint import packing
from rac_modifier.checkpoint.files import INDEX_FILE, JOURNAL_FILE, TensorFiles
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import PackSummary, mark_dense, pack_checkpoint
from rac_modifier.checkpoint.sources import iter_dense_tensors
from rac_modifier.errors import RacError

Saved = Callable[..., tuple[Path, dict[str, torch.Tensor], dict[str, str]]]
Q = "model.layers.0.self_attn.q_proj"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_restores(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = dict(iter_dense_tensors(folder))
    assert found.keys() == expected.keys() - ({"lm_head.weight"} - found.keys())
    for name, tensor in found.items():
        assert same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize("tied", [True, False])
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
    parts = {"compressed", "bitmask", "shape"} | ({"row_offsets"} if structure == "unstructured" else set())
    for name in modules:
        assert {part for part in (*parts, "row_offsets", "weight") if f"{name}.{part}" in names} == parts
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
            tensor.numel() for name, tensor in expected.items() if not (tied and name == "lm_head.weight")
        )


def test_sparsity_config_is_what_compressed_tensors_parses(saved: Saved) -> None:
    config = pytest.importorskip("compressed_tensors.config")
    for structure in ("2:4", "unstructured"):
        folder, _, _ = saved(structure)
        raw = config_of(folder)["quantization_config"]["sparsity_config"]
        parsed = config.SparsityCompressionConfig.load_from_registry(raw["format"], **raw)
        assert config.SparsityStructure(parsed.sparsity_structure).value == structure
        for path in folder.iterdir():
            path.unlink()


def test_summary(saved: Saved) -> None:
    folder, expected, modules = saved(packed=False)
    summary = pack_checkpoint(folder, modules)
    assert summary.format == "sparse-24-bitmask"
    assert [module.name for module in summary.modules] == sorted(modules)
    for module in summary.modules:
        weight = expected[f"{module.name}.weight"]
        assert (module.rows, module.columns) == tuple(weight.shape)
        assert module.sparsity == float((weight == 0).double().mean())
        assert module.packed_bytes == weight.numel() * 9 // 8 + 16
    assert summary.global_sparsity == pytest.approx(0.5)
    assert summary.dense_bytes == sum(expected[f"{name}.weight"].nbytes for name in modules)


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
    assert config["rac_sparsity"]["modules"] == {n: s.replace("0:0", "unstructured") for n, s in modules.items()}
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
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
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


@pytest.mark.parametrize(
    ("modules", "dense", "message"),
    [
        ({}, [], "no modules to pack"),
        ({"model.nothing": "2:4"}, [], r"model\.nothing\.weight: not in"),
        ({Q: "5:4"}, [], "'5:4' is no pattern"),
        ({Q: "dense"}, [], "'dense' is no pattern"),
        ({Q: "2:4"}, [Q], "named both"),
        ({"model.norm": "2:4"}, [], r"model\.norm: shape \[64\]"),
        ({"model.layers.0.self_attn.o_proj": "2:4"}, [], "more than 2 nonzeros"),
        ({Q: "2:4", "model.layers.0.self_attn.o_proj": "2:4"}, [], "more than 2 nonzeros"),
    ],
)
@pytest.mark.parametrize("shard", [None, "60KB"])
def test_refusals_leave_the_folder_as_it_was(
    saved: Saved, shard: str | None, modules: dict[str, str], dense: list[str], message: str
) -> None:
    folder, _, _ = saved(packed=False, shard=shard)
    before = contents(folder)
    with pytest.raises(RacError, match=message):
        pack_checkpoint(folder, modules, dense)
    assert contents(folder) == before


def test_packing_twice_is_refused(saved: Saved) -> None:
    folder, _, modules = saved()
    before = contents(folder)
    with pytest.raises(RacError, match="packed already"):
        pack_checkpoint(folder, modules)
    with pytest.raises(RacError, match="packed already"):
        mark_dense(folder, modules)
    assert contents(folder) == before


def test_other_quantisers_are_refused(saved: Saved) -> None:
    folder, _, modules = saved(packed=False)
    (folder / "config.json").write_text(
        json.dumps(config_of(folder) | {"quantization_config": {"quant_method": "gptq"}})
    )
    before = contents(folder)
    with pytest.raises(RacError, match="quantised by 'gptq'"):
        pack_checkpoint(folder, modules)
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


@pytest.mark.parametrize("write", [1, 2])
def test_no_room_leaves_the_old_checkpoint(saved: Saved, monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    folder, expected, modules = saved(packed=False, shard="60KB")
    before = contents(folder)
    calls = 0

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        nonlocal calls
        calls += 1
        save_file(tensors, path, metadata=metadata)
        if calls == write:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "save_file", full)
    with pytest.raises(RacError, match=r"No space left on device.*make room"):
        pack_checkpoint(folder, modules)
    assert contents(folder) == before
    assert same_bits(load_model(folder).state_dict()[f"{Q}.weight"], expected[f"{Q}.weight"])


def test_a_kill_among_the_renames_is_noticed_and_finished(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected, modules = saved(packed=False, shard="60KB")
    rename = os.replace
    into_place = [0]
    steps = 3

    def dies(source: os.PathLike, target: os.PathLike) -> None:
        if Path(source).name.startswith(".rac_new.") and Path(target).name[0] != ".":
            into_place[0] += 1
            if into_place[0] > steps:
                raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            pack_checkpoint(folder, modules)
    assert (folder / JOURNAL_FILE).exists()
    # Loaders that know nothing of the journal already see the new config.json.
    assert config_of(folder)["quantization_config"]["sparsity_config"]["targets"] == ["Linear"]
    for look in (load_model, lambda f: list(iter_dense_tensors(f)), TensorFiles):
        with pytest.raises(RacError, match="cut off half way"):
            look(folder)
    summary = pack_checkpoint(folder, modules)
    assert isinstance(summary, PackSummary)
    assert [module.name for module in summary.modules] == sorted(modules)
    assert_restores(folder, expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_kill_while_writing_leaves_only_temporary_files_that_the_next_call_removes(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected, modules = saved(packed=False)
    (folder / ".rac_new.model.safetensors").write_bytes(b"half a fi")
    assert_restores(folder, expected)
    pack_checkpoint(folder, modules)
    assert_restores(folder, expected)
    assert not (folder / ".rac_new.model.safetensors").exists()


@pytest.mark.parametrize(
    "journal",
    [
        {"files": ["../victim"], "summary": None},
        {"files": "config.json"},
        {"files": [3], "summary": {"modules": []}},
        {
            "files": ["../victim"],
            "summary": {"format": "x", "modules": [], "global_sparsity": 0, "dense_bytes": 0, "packed_bytes": 0},
        },
        {},
    ],
)
def test_a_hostile_journal_renames_nothing_outside(saved: Saved, journal: dict) -> None:
    folder, _, modules = saved(packed=False)
    victim = folder.parent / "victim"
    victim.write_text("precious")
    (folder / JOURNAL_FILE).write_text(json.dumps(journal))
    with pytest.raises(RacError, match="damaged"):
        pack_checkpoint(folder, modules)
    assert victim.read_text() == "precious"


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
