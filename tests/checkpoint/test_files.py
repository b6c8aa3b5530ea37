"""The safetensors files of a folder: read by name, and what is malformed or lost."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.files import INDEX_FILE, SINGLE_FILE, TensorFiles
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.errors import RacError

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.codes": torch.tensor([1, -2], dtype=torch.int8),
    "b.half": torch.ones(4, dtype=torch.bfloat16),
    "b.small": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "b.one": torch.tensor(True),
    "b.none": torch.zeros(0, 4),
}


def single(folder: Path) -> Path:
    save_file(TENSORS, folder / SINGLE_FILE, metadata={"format": "pt", "note": "x"})
    return folder


def sharded(folder: Path) -> Path:
    where = {}
    for number, part in enumerate(("a.", "b.")):
        tensors = {name: tensor for name, tensor in TENSORS.items() if name.startswith(part)}
        save_file(tensors, folder / f"model-{number}.safetensors")
        where |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("layout", [single, sharded])
def test_tensors_and_what_the_headers_show(tmp_path, layout):
    with TensorFiles(layout(tmp_path)) as files:
        assert files.where.keys() == TENSORS.keys()
        assert (files.index is None) == (layout is single)
        for name, tensor in TENSORS.items():
            assert name in files
            assert torch.equal(files.tensor(name).view(torch.uint8), tensor.view(torch.uint8))
            assert files.shape(name) == tuple(tensor.shape)
            assert files.dtype(name) == tensor.dtype
            assert files.nbytes(name) == tensor.nbytes
        assert [files.dtype_name(name) for name in list(TENSORS)[:3]] == ["F32", "I8", "BF16"]
        assert "c" not in files
        with pytest.raises(RacError, match=r"^c: not in .*; copy or save the model again"):
            files.tensor("c")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "no file .* here"),
        ({"weight_map": {"a": "b\0.safetensors"}}, "no file .* here"),
        ({"weight_map": {"nowhere": "model-0.safetensors"}}, "nowhere: in the index, but not"),
        ({"weight_map": {"a.weight": "lost.safetensors"}}, r"lost\.safetensors: no regular file"),
    ],
)
def test_a_malformed_index(tmp_path, index, message):
    sharded(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(RacError, match=message):
        TensorFiles(tmp_path)


def test_folders_that_hold_no_checkpoint(tmp_path):
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, r"no model\.safetensors or model\.safetensors\.index\.json;"),
    ):
        with pytest.raises(RacError, match=message):
            TensorFiles(folder)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path):
    """With a memory-mapped file, the process would end with SIGBUS."""
    save_file({"big": torch.zeros(1000)}, tmp_path / SINGLE_FILE)
    with TensorFiles(tmp_path) as files:
        path = tmp_path / SINGLE_FILE
        os.truncate(path, path.stat().st_size - 400)
        with pytest.raises(RacError, match=r"^big: cannot be read from .*; copy the model again"):
            files.tensor("big")


def test_two_answers_to_what_the_weights_are_refused(saved):
    """This package and vLLM would read the index, and transformers the single file."""
    folder, _, _ = saved(shard="60KB", packed=False)
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    for read in TensorFiles, load_model, inspect_checkpoint:
        with pytest.raises(RacError, match=r"holds both model\.safetensors and"):
            read(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", INDEX_FILE])
def test_a_pipe_is_not_waited_for(saved, file):
    folder, _, _ = saved(shard="60KB" if file == INDEX_FILE else None)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(RacError, match="no regular file"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize("name", ["a" * 257, "layers." + "1" * 20])
def test_a_name_on_which_patterns_would_take_long_is_refused(tmp_path, name):
    save_file({name: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RacError, match=f"tensor name '{name[:70]}.* has {len(name)} characters"):
        inspect_checkpoint(tmp_path)


def test_control_characters_in_a_name_are_damage(tmp_path):
    """A terminal would obey them: a table with a forged line."""
    save_file({"a\x1b[2Kb": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RacError, match="holds control characters") as error:
        TensorFiles(tmp_path)
    assert str(error.value).isprintable()
