"""`load_model`: what transformers only warns of is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint import load
from rac_modifier.checkpoint.load import load_model
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    Saved,
    assert_same_state,
    edited,
    edited_config,
)

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shard", [None, "60KB"])
def test_packed_and_dense_folders(saved: Saved, shard: str | None, packed: bool) -> None:
    folder, expected, _ = saved(shard=shard, packed=packed)
    for path in (folder, str(folder)):
        assert_same_state(load_model(path), expected)


def test_dtype_is_found_without_one_in_the_config(saved: Saved) -> None:
    folder, expected, _ = saved()
    with edited_config(folder) as config:
        del config["dtype"]
    assert_same_state(load_model(folder), expected)


def test_a_checkpoint_of_older_compressed_tensors(saved: Saved) -> None:
    """As compressed-tensors up to 0.14 wrote them: `shape` flat or a column, no rac_sparsity."""
    folder, expected, modules = saved()
    with edited(folder) as tensors:
        for name in list(modules)[::2]:
            tensors[f"{name}.shape"] = tensors[f"{name}.shape"].flatten()
    with edited_config(folder) as config:
        del config["rac_sparsity"]
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


def without(*names: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return damage


def replaced(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return damage


def added(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.zeros(64, 64)})


SHORT = replaced("model.norm.weight", lambda tensor: tensor[:3])
MISFIT = r"model\.norm\.weight: its shape .*does not fit the model's config\.json"
EXTRA = "model.layers.9.mlp.up_proj.weight"
MISSING = f"{Q}.weight: needed by the model but missing"


@pytest.mark.parametrize(
    ("packed", "damage", "message"),
    [
        (True, without(f"{Q}.bitmask", f"{Q}.compressed", f"{Q}.shape"), MISSING),
        (False, without(f"{Q}.weight"), MISSING),
        (True, without(f"{Q}.shape"), f"{Q}.shape: missing"),
        (True, without("model.embed_tokens.weight"), r"(lm_head\.weight, )?model\.embed_tokens"),
        (True, replaced(f"{Q}.bitmask", torch.zeros_like), f"{Q}.bitmask: "),
        (True, added(f"{Q}.weight"), f"{Q}.weight: stored both dense and packed"),
        (True, added(EXTRA), f"{EXTRA}: not a tensor of the model, but in"),
        (False, added(EXTRA), f"{EXTRA}: not a tensor of the model, but in"),
        (True, SHORT, MISFIT),
        (False, SHORT, MISFIT),
    ],
)
def test_missing_damaged_and_unknown_tensors_are_errors(
    saved: Saved, packed: bool, damage: Callable[[Tensors], None], message: str
) -> None:
    folder, _, _ = saved(packed=packed)
    with edited(folder) as tensors:
        damage(tensors)
    for options in {}, {"ignore_mismatched_sizes": True}:
        with pytest.raises(RacError, match=f"^{message}"):
            load_model(folder, **options)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.pop("quantization_config"), "no sparsity_config"),
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
    with edited_config(folder) as config:
        edit(config)
    with pytest.raises(RacError, match=message):
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


@pytest.mark.parametrize(
    ("key", "value"), [("pad_token_id", "x"), ("num_attention_heads", 0), ("hidden_act", "none")]
)
def test_whatever_transformers_raises_names_the_model(
    saved: Saved, key: str, value: object
) -> None:
    folder, _, _ = saved()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(RacError, match=f"^{folder}: cannot be loaded .*compare its config"):
        load_model(folder)
