"""Heads and embeddings that a checkpoint has in int8 or int4: alone, as shards of ranks, and in a served model."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin.config import RacConfig  # noqa: E402
from rac_modifier.vllm_plugin.vocabulary import StoredMethod, VocabularyMethod  # noqa: E402
from tests.vllm_plugin.stored_forms import int4, quantization, quantize  # noqa: E402

ROWS, COLUMNS = 70, 64  # vLLM pads the rows to 128
SCHEMES = ["int4", "int4 per row", "int4 asymmetric", "int8", "int8 in words", "int8 in groups"]


def scheme_of(name: str) -> dict[str, object]:
    """The config group of such a weight."""
    weights = {
        "num_bits": int(name[3]),
        "type": "int",
        "symmetric": "asym" not in name,
        "strategy": "group",
        "group_size": 32,
    }
    if name in ("int4 per row", "int8", "int8 in words"):
        weights |= {"strategy": "channel", "group_size": None}
    if name not in ("int8", "int8 in groups"):
        return {"weights": weights, "input_activations": None, "format": "pack-quantized"}
    # vLLM accepts this format with quantized activations only
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"weights": weights, "input_activations": inputs, "format": "int-quantized"}


def stored(weight: torch.Tensor, name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors on disk, and the weight that they mean."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if name.startswith("int4"):
        return int4(weight, None if name == "int4 per row" else 32, "asym" not in name)
    if name == "int8 in groups":
        parts = weight.view(len(weight), -1, 32)
        scale = parts.abs().amax(-1) / 127
        values = (parts / scale[..., None]).round().view(weight.shape).to(torch.int8)
    else:
        values, scale, _ = quantize(weight, "int8")
    meant = (values.float().view(len(weight), scale.shape[1], -1) * scale[..., None]).view(
        weight.shape
    )
    if name == "int8 in words":
        words = pack_to_int32(values, 8)
        return {
            "weight_packed": words,
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }, meant
    return {"weight": values, "weight_scale": scale}, meant


def made(monkeypatch, kind: type, name: str, rank: int = 0, size: int = 1):
    """A head or embedding as a model makes it."""
    on_rank(monkeypatch, rank, size)
    group = {**scheme_of(name), "targets": ["lm_head", "embed"]}
    config = RacConfig.from_config(quantization(config_groups={"g": group}, ignore=[]))
    prefix = "lm_head" if kind is ParallelLMHead else "embed"
    return kind(ROWS, COLUMNS, params_dtype=torch.float32, quant_config=config, prefix=prefix)


def fill(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("name", "kernels"), [*((name, True) for name in SCHEMES), ("int4", False), ("int8", False)]
)
def test_logits_and_rows_are_those_of_the_stored_weight(monkeypatch, name, kernels):
    """With kernels, and without, where it is expanded to floats."""
    if not kernels:
        without_kernels(monkeypatch)
    elif support().isa in (None, "portable"):
        pytest.skip(support().reason)
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), name)
    head = made(monkeypatch, ParallelLMHead, name)
    fill(head, tensors)
    assert hasattr(head, "weight_packed") == kernels
    x = torch.randn(3, COLUMNS)
    logits = head.quant_method.apply(head, x)
    assert logits.shape == (3, 128)
    assert not logits[:, ROWS:].any()
    torch.testing.assert_close(logits[:, :ROWS], x @ meant.T, rtol=1e-3, atol=1e-2)
    embedding = made(monkeypatch, VocabParallelEmbedding, name)
    fill(embedding, tensors)
    ids = torch.tensor([[0, 69, 33], [5, 5, 16]])
    torch.testing.assert_close(embedding(ids), meant[ids])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_rows(monkeypatch, rank):
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), "int4 asymmetric")
    head = made(monkeypatch, ParallelLMHead, "int4 asymmetric", rank, 2)
    fill(head, tensors)
    x = torch.randn(2, COLUMNS)
    expected = torch.nn.functional.pad(x @ meant.T, (0, 128 - ROWS))[:, 64 * rank : 64 * rank + 64]
    torch.testing.assert_close(head.quant_method.apply(head, x), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("kernels", "named"), [(True, True), (True, False), (False, True)])
def test_a_head_that_is_tied_to_a_stored_embedding_shares_it(monkeypatch, kernels, named):
    """Whether config.json quantizes the head as well, or names the embedding alone."""
    if not kernels:
        without_kernels(monkeypatch)
    elif support().isa in (None, "portable"):
        pytest.skip(support().reason)
    tensors, meant = stored(torch.randn(ROWS, COLUMNS), "int8")
    embedding = made(monkeypatch, VocabParallelEmbedding, "int8")
    config = RacConfig.from_config(
        quantization(
            config_groups={
                "g": {**scheme_of("int8"), "targets": ["lm_head", "embed"] if named else ["embed"]}
            },
            ignore=[],
        )
    )
    config.get_quant_method(embedding, "embed")
    head = ParallelLMHead(
        ROWS, COLUMNS, params_dtype=torch.float32, quant_config=config, prefix="lm_head"
    )
    assert type(head.quant_method) is (StoredMethod if named else VocabularyMethod)
    assert head.tie_weights(embedding) is head
    fill(embedding, tensors)
    fill(head, {})
    if kernels:
        assert head.weight_packed is embedding.weight_packed
    else:
        assert head.weight is embedding.weight
    x = torch.randn(2, COLUMNS)
    torch.testing.assert_close(
        head.quant_method.apply(head, x)[:, :ROWS], x @ meant.T, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "int8",
            {"weight": None, "weight_scale": None},
            "lm_head: the checkpoint lacks its weight",
        ),
        (
            "int8",
            {"weight": torch.zeros(ROWS, COLUMNS)},
            r"lm_head.weight: torch.float32 .* config.json says that it is int8",
        ),
        (
            "int8",
            {"weight_scale": torch.ones(ROWS, 2)},
            "lm_head.weight_scale: 2 per row of 64 columns",
        ),
        (
            "int8 in words",
            {"weight_zero_point": torch.zeros(ROWS, 1)},
            "lm_head.weight_zero_point: the int8 kernels read",
        ),
        ("int4", {"weight_shape": torch.tensor([3, 64])}, "lm_head.weight_packed"),
        (
            "int8",
            {"rows": 60},
            r"lm_head: the checkpoint has a weight \[60, 64\], the model's config.json has \[70, 64\]",
        ),
    ],
)
def test_what_is_damaged_is_named(monkeypatch, name, change, says):
    tensors, _ = stored(torch.randn(change.pop("rows", ROWS), COLUMNS), name)
    tensors = {part: tensor for part, tensor in {**tensors, **change}.items() if tensor is not None}
    head = made(monkeypatch, ParallelLMHead, name)
    with pytest.raises(RacError, match=says):
        fill(head, tensors)
