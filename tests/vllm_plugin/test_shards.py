"""Damaged, missing and contradicting parts of a layer's shards."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoint.test_stored_weight import random_weight
from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from tests.vllm_plugin.layer_kinds import (  # noqa: E402
    KINDS,
    K,
    config_of,
    finish,
    load,
    make,
    quantized,
    quantized_config,
    weights_of,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "missing"),
        ({"weight_scale": torch.ones(63, 1)}, "shape"),
        ({"weight_scale": torch.ones(64, 5)}, "shape"),
        ({"weight_scale": torch.full((64, 1), float("nan"))}, "not finite"),
        ({"weight_scale": torch.ones(64, 1, dtype=torch.int64)}, "int64"),
        ({"weight_zero_point": torch.zeros(64, 1)}, "symmetric"),
    ],
)
def test_damaged_scales(monkeypatch, change, message):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", quantized_config(FORMAT_BITMASK))
    (shard, module, weight), *_ = weights_of("column", False)
    values, scale, _ = quantized(weight, "int8")
    parts = {**pack(values, FORMAT_BITMASK, module), "weight_scale": scale, **change}
    load(layer, shard, {name: tensor for name, tensor in parts.items() if tensor is not None})
    with pytest.raises(RacError, match=rf"^a\.column\.{next(iter(change))}: .*{message}"):
        finish(layer)


@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
class TestDamage:
    def test_a_shard_is_missing(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("qkv", config_of(format))
        for shard, module, weight in weights_of("qkv", True):
            if shard != "k":
                load(layer, shard, pack(weight, format, module))
        with pytest.raises(
            RacError, match=r"a\.qkv: the checkpoint lacks the weight of a\.q or a\.k or a\.v"
        ):
            finish(layer)

    def test_nothing_was_loaded(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 2)
        for kind in ("row", "column"):
            with pytest.raises(RacError, match="the checkpoint lacks the weight of a"):
                finish(make(kind, config_of(format)))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_another_models_shapes(self, monkeypatch, format, kind, rank):
        on_rank(monkeypatch, rank, 2)
        for rows, columns in ((8, 0), (-8, 0), (0, 8), (0, -8)):
            layer = make(kind, config_of(format))
            for seed, (shard, module, n) in enumerate(KINDS[kind][2]):
                weight = random_weight(n + rows, K + columns, seed, True)
                load(layer, shard, pack(weight, format, module))
            if rows > 0 and kind == "qkv on disk":
                continue  # vLLM itself takes the first rows: with replicated heads it does not tell how many there are
            with pytest.raises(
                RacError, match=r"a\.\w+: .*(do not belong together|cannot be sharded)"
            ):
                finish(layer)

    def test_a_damaged_shard_is_named(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("merged", config_of(format))
        for shard, module, weight in weights_of("merged", True):
            tensors = pack(weight, format, module)
            if shard == 1:
                tensors["bitmask"][3, 5] ^= 0x10
            load(layer, shard, tensors)
        with pytest.raises(RacError, match=r"^a\.up\.\w+: .*damaged"):
            finish(layer)

    def test_both_forms(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("column", config_of(format))
        (_, module, weight), *_ = weights_of("column", True)
        load(layer, None, {**pack(weight, format, module), "weight": weight})
        with pytest.raises(RacError, match="stored both dense and packed"):
            finish(layer)

    def test_quantized_values_without_their_scheme(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("column", config_of(format))
        load(
            layer, None, pack(random_weight(64, K, 0, True).mul(40).to(torch.int8), format, "a.up")
        )
        with pytest.raises(RacError, match=r"a\.column\.weight_scale: missing.*config_groups"):
            finish(layer)
