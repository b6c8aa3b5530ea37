"""Packed experts are expanded in the stream of weights that vLLM loads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.checkpoint.test_stored_weight import random_weight
from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.interface import stay_dense  # noqa: E402
from rac_modifier.vllm_plugin import experts  # noqa: E402
from rac_modifier.vllm_plugin.experts import check_complete, expand_experts, expanded  # noqa: E402
from rac_modifier.vllm_plugin.sparse_layers import SparseLayers  # noqa: E402
from rac_modifier.vllm_plugin.summary import Summary  # noqa: E402

UP, DOWN = random_weight(8, 16, 0, True), random_weight(16, 8, 1, True)


def stream(format: str) -> list[tuple[str, torch.Tensor]]:
    """Two packed experts, whose parts are mixed, and another tensor."""
    up, down = pack(UP, format, "0.up"), pack(DOWN, format, "0.down")
    parts = [(f"0.up.{part}", up[part]) for part in up] + [
        (f"0.down.{part}", down[part]) for part in down
    ]
    return [
        *sorted(parts, key=lambda named: named[0].rpartition(".")[2]),
        ("gate.bias", torch.ones(3)),
    ]


@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
def test_weights_take_the_place_of_their_parts(format):
    incomplete: dict = {}
    found = dict(expanded(stream(format), format, "experts", incomplete))
    assert found.keys() == {"0.up.weight", "0.down.weight", "gate.bias"}
    assert torch.equal(found["0.up.weight"], UP)
    assert torch.equal(found["0.down.weight"], DOWN)
    check_complete(incomplete, format, "experts")


def test_parts_may_come_in_several_calls():
    incomplete: dict = {}
    named = stream(FORMAT_24)
    found = dict(expanded(named[:3], FORMAT_24, "experts", incomplete))
    with pytest.raises(RacError, match=r"^experts\.0\.\w+\.\w+: missing from the checkpoint"):
        check_complete(incomplete, FORMAT_24, "experts")
    found |= dict(expanded(named[3:], FORMAT_24, "experts", incomplete))
    assert torch.equal(found["0.down.weight"], DOWN)
    check_complete(incomplete, FORMAT_24, "experts")


def test_a_damaged_expert_is_named():
    named = [
        (name, -tensor if name == "0.up.shape" else tensor) for name, tensor in stream(FORMAT_24)
    ]
    with pytest.raises(RacError, match=r"^experts\.0\.up\.\w+: .*damaged"):
        list(expanded(named, FORMAT_24, "experts", {}))


def test_the_layer_loads_weights_and_is_checked_at_the_end():
    got: dict[str, torch.Tensor] = {}
    finished: list[object] = []
    layer = SimpleNamespace(load_weights=lambda weights: got.update(weights))
    inner = SimpleNamespace(process_weights_after_loading=finished.append)
    summary = Summary()
    layers = SparseLayers(FORMAT_24, ("Linear",))
    assert expand_experts(layer, "experts", layers, inner, summary) is inner
    layer.load_weights(stream(FORMAT_24)[:2])
    with pytest.raises(RacError, match="missing from the checkpoint"):
        inner.process_weights_after_loading(layer)
    layer.load_weights(stream(FORMAT_24)[2:])
    inner.process_weights_after_loading(layer)
    assert finished == [layer]
    assert torch.equal(got["0.up.weight"], UP)
    assert summary.decisions["experts"].reason.startswith(
        "dense because experts have no sparse kernel"
    )


def test_the_summary_is_logged_when_all_layers_are_decided(monkeypatch):
    """Also where the packed experts are the last of them, or the only ones."""
    logged: list[str] = []
    monkeypatch.setattr(
        experts.logger, "info", lambda template, text: logged.append(template % text)
    )
    summary = Summary()
    summary.expect()  # a linear layer
    layers = [SimpleNamespace(load_weights=lambda weights: None) for _ in range(2)]
    methods = [SimpleNamespace(process_weights_after_loading=lambda layer: None) for _ in range(2)]
    for number, (layer, method) in enumerate(zip(layers, methods, strict=True)):
        expand_experts(
            layer, f"{number}.experts", SparseLayers(FORMAT_24, ("Linear",)), method, summary
        )
    assert summary.add("0.attention", stay_dense("a reason", torch.bfloat16)) is None
    methods[0].process_weights_after_loading(layers[0])
    assert logged == []
    methods[1].process_weights_after_loading(layers[1])
    assert len(logged) == 1
    assert "0 of 3 pruned layers run on a sparse kernel" in logged[0]
    assert "on this device: expanded at load: 2 layers, such as 0.experts" in logged[0]


def test_experts_that_are_stored_dense_are_vllms():
    layers = SparseLayers(None, ("a",))
    inner = SimpleNamespace()
    assert expand_experts(SimpleNamespace(), "experts", layers, inner, Summary()) is inner
