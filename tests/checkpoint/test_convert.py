"""Models of others packed into a new folder, and unpacked to what stock loaders read."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint, pack_model, unpack_model
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    PRUNERS,
    SCHEMES,
    assert_restores,
    assert_same_state,
    config_of,
    contents,
    edited_config,
    same_bits,
    save_quantized,
    stock,
    tiny_model,
)
from tests.tiny import linears, tiny_tokenizer


def packed(source: Path, out: Path, **options: bool) -> Path:
    pack_model(plan_packing(source, **options), out, "owner/base")
    return out


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    actual, expected = tensors_of(folder), tensors_of(other)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(actual[name], tensor), name


@pytest.mark.parametrize(("structure", "shard"), [("2:4", None), ("unstructured", "20KB")])
def test_a_dense_stored_model_of_others(saved, tmp_path, structure, shard):
    """Packed, loaded, and unpacked again: the same bits; the source is as before."""
    folder, expected, modules = saved(structure, packed=False, shard=shard, dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder)
    before = contents(folder)
    plan = plan_packing(folder)
    assert plan.structures == modules
    out = packed(folder, tmp_path / "out")
    assert contents(folder) == before
    assert_restores(out, expected)
    assert_same_state(load_model(out), expected)
    assert (out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert {path.name[0] for path in out.iterdir()} & {"."} == set()
    sparsity = config_of(out)["quantization_config"]["sparsity_config"]
    assert sparsity["ignore"] == ["model.layers.0.self_attn.o_proj"]
    record = json.loads((out / "rac_run.json").read_text())
    assert record["base_model"] == "owner/base"
    assert record["packing"]["modules"] == {structure: len(modules)}
    assert "import rac_modifier" in (out / "README.md").read_text()

    summary = unpack_model(out, tmp_path / "dense")
    assert list(summary.modules) == sorted(modules)
    assert summary.dense_bytes == sum(expected[f"{name}.weight"].nbytes for name in modules)
    assert_same_tensors(tmp_path / "dense", folder)
    actual = config_of(tmp_path / "dense")
    assert actual.pop("rac_sparsity") == {"storage": "dense", "modules": modules}
    assert actual == config_of(folder)
    if shard:
        index, again = (
            json.loads((f / "model.safetensors.index.json").read_text())
            for f in (folder, tmp_path / "dense")
        )
        assert again["weight_map"] == index["weight_map"]
        assert again["metadata"]["total_size"] == index["metadata"]["total_size"]


@pytest.mark.parametrize(("scheme", "structure"), zip(SCHEMES, 2 * [*PRUNERS], strict=True))
def test_a_quantized_model_of_others(tmp_path, scheme, structure):
    modules = save_quantized(tmp_path / "model", structure, scheme)
    dense = stock(tmp_path / "model")
    expected = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    out = packed(tmp_path / "model", tmp_path / "out")
    assert config_of(out)["rac_sparsity"]["modules"].keys() == modules.keys()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert_same_state(model, expected)
    assert model.config.quantization_config.to_dict() == dense.config.quantization_config.to_dict()
    unpack_model(out, tmp_path / "dense")
    assert_same_tensors(tmp_path / "dense", tmp_path / "model")
    before = config_of(tmp_path / "model")["quantization_config"]
    before.pop("sparsity_config", None)
    assert config_of(tmp_path / "dense")["quantization_config"] == before
    assert_same_state(stock(tmp_path / "dense"), expected)


def test_the_layers_with_8_bit_activations_stay_recorded(tmp_path):
    modules = save_quantized(tmp_path / "model", "2:4", "w4")
    eight = sorted(modules)[:2]
    with edited_config(tmp_path / "model") as config:
        config["rac_sparsity"] = {"storage": "dense", "int8_activations": eight}
    out = packed(tmp_path / "model", tmp_path / "out")
    unpack_model(out, tmp_path / "dense")
    for folder in (out, tmp_path / "dense"):
        record = config_of(folder)["rac_sparsity"]
        assert (record["modules"].keys(), record["int8_activations"]) == (modules.keys(), eight)


def test_negative_zeros_are_kept_or_dropped_as_asked(tmp_path):
    """A mask that is multiplied in leaves -0.0 where a negative weight was."""
    model = tiny_model(tied=False)
    for linear in linears(model).values():
        kept = torch.zeros_like(linear.weight, dtype=torch.bool)
        kept.view(-1, 4)[:, :2] = True
        linear.weight.data *= kept
    model.save_pretrained(tmp_path / "model")
    kept = packed(tmp_path / "model", tmp_path / "kept", keep_negative_zeros=True)
    assert_same_state(load_model(kept), model.state_dict())
    dropped = packed(tmp_path / "model", tmp_path / "dropped")
    sparsity = config_of(dropped)["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == "sparse-24-bitmask"
    state = load_model(dropped).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_files_that_are_no_part_of_a_checkpoint_are_left(saved, tmp_path):
    folder, _, _ = saved(packed=False)
    left = {"pytorch_model.bin", "consolidated.safetensors", ".cache"}
    for name in (*left, "LICENSE", "vocab.txt"):
        (folder / name).write_text(name)
    (folder / "original").mkdir()
    names = {path.name for path in packed(folder, tmp_path / "out").iterdir()}
    assert {"LICENSE", "vocab.txt", "generation_config.json"} <= names
    assert not names & {*left, "original"}


def test_further_chat_templates_go_along(saved, tmp_path):
    folder, _, _ = saved(packed=False)
    tokenizer = tiny_tokenizer()
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates").is_dir()
    out = packed(folder, tmp_path / "out")
    unpack_model(out, tmp_path / "dense")
    for copy in (out, tmp_path / "dense"):
        assert AutoTokenizer.from_pretrained(copy).chat_template == templates


def test_the_pooling_and_projection_of_an_embedding_model_go_along(saved, tmp_path):
    """Without 1_Pooling vLLM pools in another way, and without 2_Dense it does not project."""
    folder, _, _ = saved(packed=False)
    names = (
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
    )
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f'{{"name": "{name}"}}')
    out = packed(folder, tmp_path / "out")
    unpack_model(out, tmp_path / "dense")
    for copy in (out, tmp_path / "dense"):
        assert all((copy / name).read_text() == (folder / name).read_text() for name in names)


@pytest.mark.parametrize("name", ["notes.txt", "additional_chat_templates"])
def test_a_link_to_what_is_elsewhere_is_not_copied(saved, tmp_path, name):
    """A folder of somebody else must not carry the user's files into a new model."""
    folder, _, _ = saved(packed=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jinja").write_text("mine")
    linked = tmp_path / "mine" / ("a.jinja" if name == "notes.txt" else "")
    (folder / name).symlink_to(linked)
    with pytest.raises(RacError, match=r": links to .*mine/a\.jinja, outside"):
        packed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(saved, tmp_path):
    folder, _, _ = saved(packed=False)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    out = packed(snapshot, tmp_path / "out")
    assert contents(out) == contents(packed(folder, tmp_path / "other"))


def test_the_tensors_of_two_files_at_most_are_in_memory(saved, tmp_path, monkeypatch):
    """A checkpoint is read tensor by tensor and written file by file."""
    folder, _, modules = saved("unstructured", packed=False, shard="30KB", tied=False)
    largest = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4 * largest
    alive: list[tuple[weakref.ref[torch.Tensor], int]] = []
    read = TensorFiles.tensor

    def counted(self: TensorFiles, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.append((weakref.ref(tensor), tensor.nbytes))
        assert sum(nbytes for ref, nbytes in alive if ref() is not None) <= 2 * largest
        return tensor

    monkeypatch.setattr(TensorFiles, "tensor", counted)
    out = packed(folder, tmp_path / "out")
    inspect_checkpoint(out)
    unpack_model(out, tmp_path / "dense")
    inspect_checkpoint(folder)
    mark_dense(folder, modules)
    pack_checkpoint(folder, modules)
    assert len(alive) > 100
