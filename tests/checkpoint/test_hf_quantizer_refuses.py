"""What `load_model` and transformers' `from_pretrained` refuse."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from rac_modifier.checkpoint.formats import FORMAT_BITMASK, FORMATS
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    Q,
    assert_same_state,
    edited,
    edited_config,
    save_quantized,
    stock,
    tiny_model,
)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.shape"])
def test_another_shape_than_the_models_is_an_error(saved, name):
    """With a quantizer, transformers would put it into the model."""
    folder, _, _ = saved("unstructured")
    with edited(folder) as tensors:
        if name.endswith(".weight"):
            tensors[name] = tensors[name][:3]
        else:
            module = name.removesuffix(".shape")
            narrow = torch.ones(8, 16, dtype=torch.bfloat16)
            for part, tensor in FORMATS[FORMAT_BITMASK].compress(narrow, module).items():
                tensors[f"{module}.{part}"] = tensor
    with pytest.raises(
        RacError,
        match=rf"^{name.rpartition('.')[0]}\.weight: its shape does not fit the model's config",
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_codes_without_their_config_group_are_not_taken_for_weights(tmp_path):
    modules = save_quantized(tmp_path, "2:4", "w8a8")
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    with edited_config(tmp_path) as config:
        for key in ("config_groups", "quantization_status"):
            del config["quantization_config"][key]
    with pytest.raises(RacError, match=r"integers, but config\.json quantizes no .* restore the"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_is_not_read_from_files_whole_is_refused(saved, monkeypatch):
    folder, expected, _ = saved()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(RacError, match="give a folder or a hub id"):
        type(tiny_model()).from_pretrained(None, config=config, state_dict=expected)
    # as for tp_plan="auto"
    monkeypatch.setattr(type(config), "distributed_config", {"tp_size": 2}, raising=False)
    with pytest.raises(RacError, match="cannot be sharded while loaded; set"):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_stock_transformers_refuses_a_packed_folder(saved, tmp_path):
    """Nobody gets random weights without an error."""
    quantized = tmp_path / "quantized"
    pack_checkpoint(quantized, save_quantized(quantized, "2:4", "w8"), ["lm_head"])
    for folder in (saved()[0], quantized):
        with pytest.raises(ValueError, match="packed sparse: import rac_modifier"):
            stock(folder)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("w8a8", f"{Q}.bitmask"),
        ("w8", f"{Q}.compressed"),
        ("w4", "model.norm.weight"),
        ("fp8", f"{Q}.weight_scale"),
    ],
)
def test_transformers_and_load_model_give_the_same_error(tmp_path, scheme, name):
    """For every number format: integers cannot be started at random, which transformers tries."""
    pack_checkpoint(tmp_path, save_quantized(tmp_path, "2:4", scheme), ["lm_head"])
    with edited(tmp_path) as tensors:
        if name == "model.norm.weight":
            del tensors[name]
        elif name.endswith("scale"):
            tensors[name][0] = 0.0
        else:
            tensors[name] = tensors[name][:-1]
    errors = []
    for load in load_model, AutoModelForCausalLM.from_pretrained:
        with pytest.raises(RacError) as error:
            load(tmp_path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith(name)


def test_a_missing_head_of_another_class_is_left_to_transformers(saved):
    folder, _, _ = saved(tied=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.score.weight.numel()
    assert AutoModel.from_pretrained(folder).layers


def test_a_checkpoint_of_older_compressed_tensors(saved):
    """As compressed-tensors up to 0.14 wrote them: `shape` flat or a column, no rac_sparsity."""
    folder, expected, modules = saved()
    with edited(folder) as tensors:
        for name in list(modules)[::2]:
            tensors[f"{name}.shape"] = tensors[f"{name}.shape"].flatten()
    with edited_config(folder) as config:
        del config["rac_sparsity"]
    assert_same_state(load_model(folder), expected)


def test_a_model_of_the_hub(saved, tmp_path):
    """It is in the hub's cache, as revision v1."""
    folder, expected, _ = saved()
    cached = tmp_path / "cache" / "models--owner--name"
    snapshot = cached / "snapshots" / ("1" * 40)
    shutil.copytree(folder, snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text(snapshot.name)
    of_cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    assert_same_state(load_model("owner/name", revision="v1", **of_cache), expected)
    with pytest.raises(RacError, match=r"^owner/none: neither a folder nor a model that can be"):
        load_model("owner/none", **of_cache)
    rotation = {"type": "hadamard", "apply": [{"location": "input", "targets": ["Linear"]}]}
    with edited_config(snapshot) as config:
        transforms = {"config_groups": {"r": rotation}}
        config["quantization_config"]["transform_config"] = transforms
    with pytest.raises(RacError, match=r"^owner/name: its config\.json has rotations"):
        load_model("owner/name", revision="v1", **of_cache)


def test_code_that_the_checkpoint_brings_is_not_run_unasked(saved):
    """Neither for a packed nor for an ordinary one."""
    for packed in (True, False):
        folder, _, _ = saved(packed=packed)
        (folder / "modeling.py").write_text("raise SystemExit('ran')")
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "model_type": "of_its_own"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"trust_remote_code|model type"):
            load_model(folder)


EXTRA = {"model.layers.9.mlp.up_proj.weight": torch.zeros(64, 64)}
UNKNOWN = r"model\.layers\.9\.mlp\.up_proj\.weight: not a tensor of the model, but in"
PARTS = dict.fromkeys(f"{Q}.{part}" for part in ("bitmask", "compressed", "shape"))
MISSING = f"{Q}.weight: needed by the model but missing"


@pytest.mark.parametrize(
    ("packed", "changes", "message"),
    [
        (True, PARTS, MISSING),
        (False, {f"{Q}.weight": None}, MISSING),
        (True, {f"{Q}.shape": None}, f"{Q}.shape: missing"),
        (True, {f"{Q}.weight": torch.zeros(64, 64)}, f"{Q}.weight: both dense and packed"),
        (True, EXTRA, UNKNOWN),
        (False, EXTRA, UNKNOWN),
        (False, {"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight: its shape does not"),
    ],
)
def test_missing_damaged_and_unknown_tensors_are_errors(saved, packed, changes, message):
    folder, _, _ = saved(packed=packed)
    with edited(folder) as tensors:
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
    with pytest.raises(RacError, match=f"^{message}"):
        load_model(folder)


def test_whatever_transformers_raises_names_the_model(saved):
    folder, _, _ = saved()
    with edited_config(folder) as config:
        config["hidden_act"] = "none"
    with pytest.raises(RacError, match=f"^{folder}: cannot be loaded .*compare its config"):
        load_model(folder)
