"""`load_model`: what transformers only warns of is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint import load
from rac_modifier.checkpoint.files import INDEX_FILE
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import Q, Saved, assert_same_state, tiny_model

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shard", [None, "60KB"])
def test_packed_and_dense_folders(saved: Saved, shard: str | None, packed: bool) -> None:
    folder, expected, _ = saved(shard=shard, packed=packed)
    for path in (folder, str(folder)):
        assert_same_state(load_model(path), expected)


def test_arguments_are_passed_on(saved: Saved) -> None:
    folder, expected, _ = saved()
    model = load_model(folder, dtype=torch.float32, device_map="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert_same_state(model, {name: tensor.float() for name, tensor in expected.items()})


def test_minus_zeros_and_full_rows_survive(tmp_path: Path) -> None:
    model = tiny_model()
    weight = model.get_submodule(Q).weight.data
    weight[0] = 0.0
    weight[1] = 1.5
    weight[2] = -0.0
    weight[3, ::2] = -0.0
    model.save_pretrained(tmp_path)
    pack_checkpoint(tmp_path, {Q: "unstructured"})
    assert_same_state(load_model(tmp_path), model.state_dict())


def test_dtype_is_found_without_one_in_the_config(saved: Saved) -> None:
    folder, expected, _ = saved()
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_state(load_model(folder), expected)


def test_a_checkpoint_of_older_compressed_tensors(saved: Saved) -> None:
    """As compressed-tensors up to 0.14 wrote them: `shape` flat or a column, no rac_sparsity."""
    folder, expected, modules = saved()
    tensors = load_file(folder / "model.safetensors")
    for name in list(modules)[::2]:
        tensors[f"{name}.shape"] = tensors[f"{name}.shape"].flatten()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["rac_sparsity"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_state(load_model(folder), expected)


def test_a_model_of_the_hub(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected, _ = saved()
    asked: list[tuple] = []
    inner = load.AutoModelForCausalLM.from_pretrained

    def from_pretrained(model: str, **kwargs: object) -> object:
        asked.append((model, kwargs.pop("revision")))
        return inner(folder, **kwargs)

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert_same_state(load_model("owner/name", revision="v1"), expected)
    assert asked == [("owner/name", "v1")]


def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(
        RacError,
        match=r"^owner/no-such-name: neither a folder nor a model that can be had from the hub",
    ):
        load_model("owner/no-such-name", local_files_only=True)


def test_code_that_the_checkpoint_brings_is_not_run_unasked(saved: Saved) -> None:
    """Neither for a packed nor for an ordinary one."""
    for packed in (True, False):
        folder, _, _ = saved(packed=packed)
        (folder / "modeling.py").write_text("raise SystemExit('ran')")
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "model_type": "of_its_own"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"trust_remote_code|model type"):
            load_model(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tensor_too_many_is_an_error(saved: Saved, packed: bool) -> None:
    folder, _, _ = saved(packed=packed)
    tensors = load_file(folder / "model.safetensors") | {
        "model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RacError,
        match=r"^model\.layers\.9\.mlp\.up_proj\.weight: not a tensor of the model, but in",
    ):
        load_model(folder)


@pytest.mark.parametrize("packed", [True, False])
def test_a_tensor_of_another_shape_is_an_error_without_being_asked_for(
    saved: Saved, packed: bool
) -> None:
    folder, _, _ = saved(packed=packed)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RacError, match=r"^model\.norm\.weight: its shape .*does not fit the model's config\.json"
    ):
        load_model(folder)


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
        (
            "2:4",
            lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(64, 64)}),
            f"{Q}.weight",
        ),
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
        (
            lambda config: config["quantization_config"]["sparsity_config"].update(
                format="sparse-new"
            ),
            "sparse-new",
        ),
        (lambda config: config["quantization_config"].update(sparsity_config=[1]), "not an object"),
        (
            lambda config: config["quantization_config"]["sparsity_config"].update(format=["a"]),
            "format",
        ),
        (
            lambda config: config["quantization_config"]["sparsity_config"].update(
                format="sparse-bitmask"
            ),
            "row_offsets",
        ),
    ],
)
def test_config_that_contradicts_the_files(
    saved: Saved, edit: Callable[[dict], object], message: str
) -> None:
    folder, _, _ = saved()
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RacError, match=message):
        load_model(folder)


def test_packed_config_over_dense_files(saved: Saved, tmp_path: Path) -> None:
    folder, _, _ = saved()
    tiny_model().save_pretrained(tmp_path / "dense")
    (folder / "model.safetensors").write_bytes(
        (tmp_path / "dense" / "model.safetensors").read_bytes()
    )
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
