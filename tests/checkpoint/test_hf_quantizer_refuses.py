"""What transformers' `from_pretrained` refuses of packed checkpoints, with our quantizer and without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from rac_modifier.checkpoint.formats import FORMAT_BITMASK, pack
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import (
    SCHEMES,
    Q,
    Saved,
    edited,
    edited_config,
    save_quantized,
    stock,
    tiny_model,
)
from tests.tiny import linears


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.o_proj.shape"])
def test_another_shape_than_the_models_is_an_error(saved: Saved, name: str) -> None:
    """With a quantizer, transformers would put it into the model."""
    folder, _, _ = saved("unstructured")
    with edited(folder) as tensors:
        if name.endswith(".weight"):
            tensors[name] = tensors[name][:3]
        else:
            module = name.removesuffix(".shape")
            narrow = torch.ones(8, 16, dtype=torch.bfloat16)
            for part, tensor in pack(narrow, FORMAT_BITMASK, module).items():
                tensors[f"{module}.{part}"] = tensor
    with pytest.raises(
        RacError,
        match=rf"^{name.rpartition('.')[0]}\.weight: its shape .* does not fit the model's config",
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_codes_without_their_config_group_are_not_taken_for_weights(tmp_path: Path) -> None:
    modules = save_quantized(tmp_path, "2:4", "w8a8")
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    with edited_config(tmp_path) as config:
        for key in ("config_groups", "quantization_status"):
            del config["quantization_config"][key]
    with pytest.raises(
        RacError, match=r"values are torch\.int8, but no config group .* restore the config\.json"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_cannot_be_unpacked(saved: Saved) -> None:
    folder, expected, _ = saved()
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(RacError, match="give from_pretrained a folder or a hub id"):
        type(tiny_model()).from_pretrained(None, config=config, state_dict=expected)


def test_a_model_that_would_be_sharded_while_it_is_loaded_is_refused(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = saved()
    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(
        type(config), "distributed_config", {"tp_size": 2}, raising=False
    )  # as for tp_plan="auto"
    with pytest.raises(
        RacError,
        match="cannot be sharded while they are loaded; save the model with storage: dense",
    ):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_stock_transformers_refuses_a_packed_folder(saved: Saved) -> None:
    """A property of transformers, not of this package: nobody gets random weights without an error."""
    folder, _, _ = saved()
    with pytest.raises(Exception):  # noqa: B017, PT011
        stock(folder)


@pytest.mark.parametrize("scheme", [*SCHEMES, None])
@pytest.mark.parametrize(
    "name", [f"{Q}.bitmask", f"{Q}.compressed", "model.norm.weight", f"{Q}.weight_scale"]
)
def test_transformers_and_load_model_give_the_same_error(
    tmp_path: Path, scheme: str | None, name: str
) -> None:
    """For every number format: integers cannot be started at random, which transformers tries."""
    if scheme is None:
        model = tiny_model()
        modules = dict.fromkeys(linears(model), "unstructured")
        model.save_pretrained(tmp_path)
    else:
        modules = save_quantized(tmp_path, "2:4", scheme)
    pack_checkpoint(tmp_path, modules, ["lm_head"])
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    if name not in tensors:
        pytest.skip("floats have no scale")
    if name.endswith(("compressed", "bitmask")):
        tensors[name] = tensors[name][:-1].contiguous()
    elif name.endswith("scale"):
        tensors[name][0] = 0.0
    else:
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    errors = []
    for load in load_model, AutoModelForCausalLM.from_pretrained:
        with pytest.raises(RacError) as error:
            load(tmp_path)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert errors[0].startswith(name)


def test_a_missing_head_of_another_class_is_left_to_transformers(saved: Saved) -> None:
    folder, _, _ = saved(tied=False)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.score.weight.numel()
    assert AutoModel.from_pretrained(folder).layers
