"""Heads and embeddings that a checkpoint has in int8 or int4: alone, and as shards of ranks."""

from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.support import support
from rac_modifier.vllm_plugin.config import RacConfig
from tests.vllm_plugin.stored_forms import int4, quantization

ROWS, COLUMNS = 70, 64  # vLLM pads the rows to 128
SCHEMES = ["int4", "int4 per row", "int4 asymmetric", "int8", "int8 in words", "int8 in groups"]
needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)


def scheme_of(name: str) -> dict[str, object]:
    """The config group of such a weight."""
    group = None if name in ("int4 per row", "int8", "int8 in words") else 32
    entry = quantization(group, "asym" not in name, int(name[3]))["config_groups"]["group_0"]
    entry["format"] = "pack-quantized"
    if name in ("int8", "int8 in groups"):  # vLLM accepts this with quantized activations only
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        entry |= {"input_activations": {**inputs, "dynamic": True}, "format": "int-quantized"}
    return entry


def stored(weight: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors on disk, and the weight that they mean."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if name.startswith("int4"):
        return int4(weight, None if name == "int4 per row" else 32, "asym" not in name)
    width = 32 if name == "int8 in groups" else weight.shape[1]
    scale = weight.view(len(weight), -1, width).abs().amax(-1) / 127
    wide = scale.repeat_interleave(width, dim=1)
    values = (weight / wide).round().to(torch.int8)
    tensors = {"weight": values, "weight_scale": scale}
    if name == "int8 in words":
        tensors["weight_packed"] = pack_to_int32(tensors.pop("weight"), 8)
        tensors["weight_shape"] = torch.tensor(weight.shape)
    return tensors, values.float() * wide


def made(monkeypatch, kind, name, rank=0, size=1, targets=("lm_head", "embed")):
    """A head or embedding as a model makes it, and its config."""
    on_rank(monkeypatch, rank, size)
    groups = {"g": {**scheme_of(name), "targets": [*targets]}}
    config = RacConfig.from_config(quantization(config_groups=groups, ignore=[]))
    if kind is ParallelLMHead:
        config.get_quant_method(VocabParallelEmbedding.__new__(VocabParallelEmbedding), "embed")
    prefix = "lm_head" if kind is ParallelLMHead else "embed"
    options = {"params_dtype": torch.float32, "quant_config": config, "prefix": prefix}
    return kind(ROWS, COLUMNS, **options)


def fill(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)


def check_logits(head: torch.nn.Module, meant: torch.Tensor) -> None:
    x = torch.randn(3, COLUMNS)
    logits = head.quant_method.apply(head, x)
    assert not logits[:, ROWS:].any()
    torch.testing.assert_close(logits[:, :ROWS], x @ meant.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        *(pytest.param(name, True, marks=needs_kernel) for name in SCHEMES),
        ("int4", False),
        ("int8", False),
    ],
)
def test_logits_and_rows_are_those_of_the_stored_weight(monkeypatch, name, kernels):
    """With kernels, and without, where it is expanded to floats."""
    if not kernels:
        without_kernels(monkeypatch)
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), name)
    head = made(monkeypatch, ParallelLMHead, name)
    if name.startswith("int4"):  # else vLLM warns
        assert all(getattr(head, part).dtype == tensor.dtype for part, tensor in tensors.items())
    fill(head, tensors)
    assert hasattr(head, "weight_packed") == kernels
    check_logits(head, meant)
    embedding = made(monkeypatch, VocabParallelEmbedding, name)
    fill(embedding, tensors)
    ids = torch.tensor([[0, 69, 33], [5, 5, 16]])
    torch.testing.assert_close(embedding(ids), meant[ids])


@needs_kernel
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_rows(monkeypatch, rank):
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), "int4 asymmetric")
    head = made(monkeypatch, ParallelLMHead, "int4 asymmetric", rank, 2)
    fill(head, tensors)
    x = torch.randn(2, COLUMNS)
    expected = torch.nn.functional.pad(x @ meant.T, (0, 128 - ROWS))[:, 64 * rank : 64 * rank + 64]
    torch.testing.assert_close(head.quant_method.apply(head, x), expected, rtol=1e-3, atol=1e-2)


@needs_kernel
def test_a_rank_may_have_nothing_but_padding(monkeypatch):
    """The rank has rows 96 to 127 of 128; the vocabulary ends at 70."""
    tensors, _ = stored(torch.randn(ROWS, COLUMNS), "int8")
    head = made(monkeypatch, ParallelLMHead, "int8", 3, 4)
    fill(head, tensors)
    logits = head.quant_method.apply(head, torch.randn(2, COLUMNS))
    assert torch.equal(logits, torch.zeros(2, 32))


@pytest.mark.parametrize(
    ("kernels", "named"),
    [
        pytest.param(True, True, marks=needs_kernel),
        pytest.param(True, False, marks=needs_kernel),
        (False, True),
    ],
)
def test_a_head_that_is_tied_to_a_stored_embedding_shares_it(monkeypatch, kernels, named):
    """Whether config.json quantizes the head as well, or names the embedding alone."""
    if not kernels:
        without_kernels(monkeypatch)
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), "int8")
    embedding = made(monkeypatch, VocabParallelEmbedding, "int8")
    targets = ["lm_head", "embed"] if named else ["embed"]
    head = made(monkeypatch, ParallelLMHead, "int8", targets=targets)
    assert (head.quant_method.shards is not None) == named
    assert head.tie_weights(embedding) is head
    fill(embedding, tensors)
    fill(head, {})
    shared = "weight_packed" if kernels else "weight"
    assert getattr(head, shared) is getattr(embedding, shared)
    check_logits(head, meant)


@needs_kernel
def test_lora_wraps_a_stored_head_and_embedding(monkeypatch):
    """With --enable-lora vLLM wraps both, and reads dtype and device of their `weight`."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm.lora.utils import from_layer_logits_processor

    tensors, _ = stored(torch.randn(ROWS, COLUMNS), "int8")
    head = made(monkeypatch, ParallelLMHead, "int8")
    embedding = made(monkeypatch, VocabParallelEmbedding, "int8")
    fill(head, tensors)
    fill(embedding, tensors)
    lora = LoRAConfig(max_lora_rank=8, lora_dtype=torch.float32)
    ranks = "vllm.lora.layers.logits_processor.get_tensor_model_parallel"
    monkeypatch.setattr(f"{ranks}_rank", lambda: 0)
    monkeypatch.setattr(f"{ranks}_world_size", lambda: 1)
    logits = from_layer_logits_processor(SimpleNamespace(vocab_size=ROWS), head, 1, lora)
    assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")
    wrapped = VocabParallelEmbeddingWithLoRA(embedding)
    wrapped.create_lora_weights(1, lora)
    assert wrapped.lora_a_stacked.shape == (1, ROWS, 8)
    assert embedding.weight.shape == (0, COLUMNS)  # a draft compares its width


FEWER = torch.zeros(60, COLUMNS, dtype=torch.int8), torch.ones(60, 1)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("int8", {"weight": None, "weight_scale": None}, ": the checkpoint lacks its weight"),
        ("int8", {"weight_scale": torch.ones(ROWS, 2)}, ".weight_scale: 2 per row of 64 columns"),
        ("int4", {"weight_shape": torch.tensor([3, 64])}, ".weight_packed"),
        (
            "int8",
            dict(zip(("weight", "weight_scale"), FEWER, strict=True)),
            r": the checkpoint has a weight \[60, 64\], the model's config.json has \[70, 64\]",
        ),
    ],
)
def test_what_is_damaged_is_named(monkeypatch, name, change, says):
    tensors = {**stored(torch.randn(ROWS, COLUMNS), name)[0], **change}
    head = made(monkeypatch, ParallelLMHead, name)
    with pytest.raises(RacError, match=f"^lm_head{says}"):
        fill(head, {part: tensor for part, tensor in tensors.items() if tensor is not None})
