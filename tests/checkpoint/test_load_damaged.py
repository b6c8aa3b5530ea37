from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint.files import INDEX_FILE
from rac_modifier.checkpoint.load import load_model
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import Q, Saved, tiny_model

Tensors = dict[str, torch.Tensor]


def without(*names: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return damage


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return damage


@pytest.mark.parametrize(
    ("structure", "damage", "named"),
    [
        ("2:4", without(f"{Q}.compressed"), f"{Q}.compressed"),
        ("2:4", without(f"{Q}.bitmask"), f"{Q}.bitmask"),
        ("2:4", without(f"{Q}.shape"), f"{Q}.shape"),
        ("2:4", without(f"{Q}.bitmask", f"{Q}.compressed", f"{Q}.shape"), f"{Q}.weight"),
        ("unstructured", without(f"{Q}.row_offsets"), f"{Q}.row_offsets"),
        ("2:4", without("model.norm.weight"), "model.norm.weight"),
        ("2:4", without("model.embed_tokens.weight"), "model.embed_tokens.weight"),
        ("2:4", replaced(f"{Q}.bitmask", torch.zeros_like), f"{Q}.bitmask"),
        ("2:4", replaced(f"{Q}.bitmask", lambda t: t[:-1]), f"{Q}.bitmask"),
        ("2:4", replaced(f"{Q}.compressed", lambda t: t[:, 1:]), f"{Q}.compressed"),
        ("unstructured", replaced(f"{Q}.compressed", lambda t: t[1:]), f"{Q}.compressed"),
        ("unstructured", replaced(f"{Q}.row_offsets", lambda t: t + 1), f"{Q}.row_offsets"),
        ("2:4", replaced("model.norm.weight", lambda t: t[:3]), "model.norm.weight"),
        ("2:4", lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(64, 64)}), f"{Q}.weight"),
    ],
)
def test_missing_or_damaged_tensors_are_errors(
    saved: Saved, structure: str, damage: Callable[[Tensors], None], named: str
) -> None:
    folder, _, _ = saved(structure)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RacError, match=rf"^(lm_head\.weight, )?{named}: "):
        load_model(folder, ignore_mismatched_sizes=True)


def test_a_missing_weight_of_an_ordinary_checkpoint_is_an_error(saved: Saved) -> None:
    folder, _, _ = saved(packed=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{Q}.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RacError, match=f"^{Q}.weight: needed by the model but missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("quantization_config"), "no sparsity_config"),
        (lambda config: config["quantization_config"]["sparsity_config"].update(format="sparse-new"), "sparse-new"),
        (lambda config: config["quantization_config"].update(sparsity_config=[1]), "not an object"),
        (lambda config: config["quantization_config"]["sparsity_config"].update(format=["a"]), "format"),
        (
            lambda config: config["quantization_config"]["sparsity_config"].update(format="sparse-bitmask"),
            "row_offsets",
        ),
        (lambda config: config.update(auto_map={"AutoModelForCausalLM": "modeling.X"}), "auto_map"),
    ],
)
def test_config_that_contradicts_the_files(saved: Saved, edit: Callable[[dict], object], message: str) -> None:
    folder, _, _ = saved()
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RacError, match=message):
        load_model(folder)


def test_packed_config_over_dense_files(saved: Saved, tmp_path: Path) -> None:
    folder, _, _ = saved()
    tiny_model().save_pretrained(tmp_path / "dense")
    (folder / "model.safetensors").write_bytes((tmp_path / "dense" / "model.safetensors").read_bytes())
    with pytest.raises(RacError, match="no tensor is packed"):
        load_model(folder)


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "", ".", 3, None])
def test_an_index_leads_nowhere_else(saved: Saved, target: object) -> None:
    folder, _, _ = saved(shard="60KB")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"][f"{Q}.bitmask"] = target
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(RacError, match="is no file of this folder"):
        load_model(folder)


def test_an_index_that_promises_too_much(saved: Saved) -> None:
    folder, _, _ = saved(shard="60KB")
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(RacError, match=r"^model\.extra: missing from"):
        load_model(folder)


def test_a_lost_shard_is_named(saved: Saved) -> None:
    folder, _, _ = saved(shard="60KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(RacError, match=lost.name):
        load_model(folder)


def test_folders_that_are_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RacError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)
    for path in (tmp_path / "nothing", "./owner/name", "../name", "~/name", "name", "a/b/c", "."):
        with pytest.raises(RacError, match=r"no such folder|neither model\.safetensors"):
            load_model(path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(RacError, match="cannot be read as safetensors"):
        load_model(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RacError, match=r"config\.json"):
        load_model(tmp_path)
