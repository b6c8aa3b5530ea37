from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rac_modifier.checkpoint import bitmask
from rac_modifier.checkpoint import hf_quantizer as load
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.checkpoint.sources import iter_dense_tensors
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import Q, Saved, assert_same_state, prune_24, tiny_model
from tests.tiny import linears


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shard", [None, "60KB"])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
@pytest.mark.parametrize("tied", [True, False])
def test_bit_identical(saved: Saved, structure: str, shard: str | None, tied: bool, packed: bool) -> None:
    folder, expected, _ = saved(structure, tied=tied, shard=shard, packed=packed)
    model = load_model(folder)
    assert_same_state(model, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not model.training
    assert model.generation_config.eos_token_id == 7
    assert model.config._name_or_path == model.name_or_path == str(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


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


@pytest.mark.parametrize("kwargs", [{"dtype": torch.float32}, {"dtype": "float16"}, {"device_map": "cpu"}])
def test_from_pretrained_arguments(saved: Saved, kwargs: dict) -> None:
    folder, expected, _ = saved()
    model = load_model(folder, **kwargs)
    wanted = {"float16": torch.float16}.get(kwargs.get("dtype"), kwargs.get("dtype", torch.bfloat16))
    assert_same_state(model, {name: tensor.to(wanted) for name, tensor in expected.items()})


def test_attention_implementation_is_passed_on(saved: Saved) -> None:
    folder, _, _ = saved()
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_dtype_is_found_without_one_in_the_config(saved: Saved) -> None:
    folder, expected, _ = saved()
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_state(load_model(folder), expected)


def test_weights_are_unpacked_one_at_a_time(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither more reads than modules, nor any before transformers asks."""
    folder, _, modules = saved()
    seen: list[str] = []
    inner = bitmask.unpack_24

    def spy(parts: dict, name: str) -> torch.Tensor:
        seen.append(name)
        return inner(parts, name)

    monkeypatch.setattr(bitmask, "unpack_24", spy)
    tensors = iter_dense_tensors(folder)
    next(tensors)
    assert len(seen) <= 1
    seen.clear()
    load_model(folder)
    assert sorted(seen) == sorted(modules)


def test_saved_again_it_is_an_ordinary_checkpoint(saved: Saved, tmp_path: Path) -> None:
    folder, expected, _ = saved()
    load_model(folder).save_pretrained(tmp_path / "again")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)


def test_stock_transformers_refuses_a_packed_folder(saved: Saved) -> None:
    """Not a wish but what is there: nobody gets random weights by surprise."""
    folder, _, _ = saved()
    with pytest.raises(Exception):  # noqa: B017, PT011
        AutoModelForCausalLM.from_pretrained(folder)


def test_legacy_checkpoint_without_our_key(saved: Saved) -> None:
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


def test_a_packed_model_of_the_hub(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected, _ = saved()
    asked: list[tuple] = []

    def cached(model: str, file: str, **hub: object) -> str:
        asked.append((model, file, hub))
        return str(folder / file)

    def snapshot(model: str, **kwargs: object) -> str:
        asked.append((model, kwargs["revision"]))
        return str(folder)

    monkeypatch.setattr(load, "cached_file", cached)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert_same_state(load_model("owner/name", revision="v1"), expected)
    assert asked == [("owner/name", "config.json", {"revision": "v1"}), ("owner/name", "v1")]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(load, "cached_file", offline)
    with pytest.raises(RacError, match=r"^owner/name: neither a folder nor a model .*no network"):
        load_model("owner/name")


def test_light_imports() -> None:
    """The formats and the dense view serve engines that must not pay for transformers; nothing imports llm-compressor."""
    code = (
        "import sys, rac_modifier.checkpoint.sources, rac_modifier.checkpoint.card, rac_modifier.checkpoint.formats\n"
        "assert 'transformers' not in sys.modules\n"
        "import rac_modifier.checkpoint.hf_quantizer, rac_modifier.checkpoint.inspect, rac_modifier.checkpoint.packing\n"
        "assert not {'llmcompressor', 'vllm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
def test_sparse_over_quantised_equals_the_stock_load(tmp_path: Path, scheme: str) -> None:
    """llm-compressor quantises and saves; packing that folder changes nothing for what load_model returns."""
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    base, folder = tmp_path / "base", tmp_path / "quantised"
    model = tiny_model()
    modules = dict.fromkeys(linears(model), "2:4")
    for linear in linears(model).values():
        prune_24(linear.weight.data)
    model.save_pretrained(base)
    model.name_or_path = model.config._name_or_path = str(base)  # oneshot asks for it
    llmcompressor.oneshot(
        model=model, recipe=[QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])]
    )
    model.save_pretrained(folder, save_compressed=True)
    mark_dense(folder, modules)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    expected = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    logits = stock(torch.tensor([[1, 2, 3]])).logits

    pack_checkpoint(folder, modules, ["lm_head"])
    packed = load_model(folder)
    assert packed.get_submodule(Q).weight.dtype in (torch.float8_e4m3fn, torch.int8)
    assert_same_state(packed, expected)
    assert torch.equal(packed(torch.tensor([[1, 2, 3]])).logits, logits)
