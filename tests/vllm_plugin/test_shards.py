"""Damaged, missing and contradicting parts of a layer's shards."""

from __future__ import annotations

import pytest

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
    weights_of,
)


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
