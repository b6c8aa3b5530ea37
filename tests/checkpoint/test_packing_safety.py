from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint import new_files
from rac_modifier.checkpoint.files import JOURNAL_FILE, TensorFiles
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import PackSummary, mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    Saved,
    assert_restores,
    config_of,
    contents,
    same_bits,
)


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


def test_packing_twice_is_refused(saved: Saved) -> None:
    folder, _, modules = saved()
    before = contents(folder)
    with pytest.raises(RacError, match="packed already"):
        pack_checkpoint(folder, modules)
    with pytest.raises(RacError, match="packed already"):
        mark_dense(folder, modules)
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
def test_no_room_leaves_the_old_checkpoint(
    saved: Saved, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    folder, expected, modules = saved(packed=False, shard="60KB")
    before = contents(folder)
    calls = 0

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        nonlocal calls
        calls += 1
        save_file(tensors, path, metadata=metadata)
        if calls == write:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(new_files, "save_file", full)
    with pytest.raises(RacError, match=r"No space left on device.*make room"):
        pack_checkpoint(folder, modules)
    assert contents(folder) == before
    assert same_bits(load_model(folder).state_dict()[f"{Q}.weight"], expected[f"{Q}.weight"])


def test_a_kill_among_the_renames_is_noticed_and_finished(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    for look in (load_model, inspect_checkpoint, TensorFiles):
        with pytest.raises(RacError, match="cut off half way"):
            look(folder)
    summary = pack_checkpoint(folder, modules)
    assert isinstance(summary, PackSummary)
    assert sorted(summary.modules) == sorted(modules)
    assert_restores(folder, expected)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
