"""Packed experts: each is run on the tokens routed to it, against one token and one expert at a time in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoint.test_stored_weight import random_weight
from tests.kernels import fake_backend
from tests.vllm_plugin.vllm_fixtures import needs_vllm, without_kernels

needs_vllm()

from vllm.model_executor.layers.fused_moe.activation import MoEActivation  # noqa: E402

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.checkpoint.stored_weight import from_dense  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels import cpu  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import experts  # noqa: E402
from rac_modifier.vllm_plugin.experts import PackedExperts, RacExpertsMethod  # noqa: E402
from rac_modifier.vllm_plugin.readers import BitmaskReader  # noqa: E402
from tests.vllm_plugin.stored_forms import quantize  # noqa: E402

EXPERTS, HIDDEN, WIDTH, CHOSEN = 5, 64, 96, 2
NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if support().isa is None:
        pytest.skip(support().reason)


class FakeLayer(torch.nn.Module):
    """What vLLM's layer of experts has that the method reads."""

    def __init__(
        self, rank: int = 0, size: int = 1, local: list[int] | None = None, **changes: Any
    ) -> None:
        super().__init__()
        self.moe_config = SimpleNamespace(
            hidden_dim=HIDDEN,
            intermediate_size=WIDTH,
            intermediate_size_per_partition=WIDTH // size,
            tp_rank=rank,
            in_dtype=torch.float32,
            has_bias=False,
            is_lora_enabled=False,
            moe_parallel_config=SimpleNamespace(enable_eplb=False),
        )
        self.global_num_experts, self.hidden_size = EXPERTS, HIDDEN
        self.expert_map_manager = SimpleNamespace(
            expert_map=None if local is None else torch.tensor(local)
        )
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = NAMES
        self.activation, self.swiglu_limit, self.apply_router_weight_on_input = (
            MoEActivation.SILU,
            None,
            False,
        )
        self.loaded: dict[str, torch.Tensor] = {}
        for name, value in changes.items():
            setattr(self, name, value)

    def load_weights(self, weights: Any) -> Any:
        for name, tensor in weights:
            self.loaded[name] = tensor
            yield name

    def _replace_quant_method(self, method: Any) -> None:
        self.quant_method = method


def weights_of(two_of_four: bool = False) -> dict[str, torch.Tensor]:
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    return {
        f"{expert}.{name}": random_weight(*shapes[name], 3 * expert + place, two_of_four)
        for expert in range(EXPERTS)
        for place, name in enumerate(NAMES)
    }


def method_of(
    layer: Any, format: str, quantized: bool = False, size: int = 1, count: int = EXPERTS
) -> RacExpertsMethod:
    decisions: dict[str, Any] = {}
    reader = BitmaskReader(format, quantized)
    method = RacExpertsMethod(layer, "a.experts", reader, decisions.__setitem__)
    method.decisions = decisions
    method.create_weights(layer, count, HIDDEN, WIDTH // size, torch.float32, weight_loader=None)
    return method


def load(layer: Any, weights: dict[str, torch.Tensor], format: str) -> None:
    """In two calls, as vLLM does for each file, with the parts mixed."""
    named = [
        (f"{name}.{part}", t)
        for name, w in weights.items()
        for part, t in pack(w, format, name).items()
    ]
    named.sort(key=lambda pair: pair[0].rpartition(".")[2])
    assert [*layer.load_weights(named[:20])] == []
    assert [*layer.load_weights(named[20:])] == []


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights that sum to one, and distinct experts of each token; expert 3 gets none."""
    ids = torch.stack(
        [torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:CHOSEN]] for _ in range(tokens)]
    )
    return torch.randn(tokens, HIDDEN), torch.rand(tokens, CHOSEN).softmax(1), ids.int()


def one_at_a_time(
    weights: dict[str, torch.Tensor], x: torch.Tensor, shares: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for place in range(CHOSEN):
            expert, input_ = int(ids[token, place]), x[token].double()
            gate = weights[f"{expert}.gate_proj"].double() @ input_
            up = weights[f"{expert}.up_proj"].double() @ input_
            gated = gate / (1 + torch.exp(-gate)) * up
            out[token] += float(shares[token, place]) * (
                weights[f"{expert}.down_proj"].double() @ gated
            )
    return out


@pytest.mark.parametrize(("format", "tokens"), [(FORMAT_24, 1), (FORMAT_BITMASK, 7)])
def test_tokens_go_through_their_experts(format, tokens):
    layer, weights = FakeLayer(), weights_of(format == FORMAT_24)
    method = method_of(layer, format)
    load(layer, weights, format)
    method.process_weights_after_loading(layer)
    decision = method.decisions["a.experts"]
    assert decision.sparse
    assert decision.kernel.endswith(", experts")
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == 2 * EXPERTS  # no dense copy beside them
    assert all("weight_packed" in name for name in names)
    x, shares, ids = routed(tokens)
    found = method.apply(layer, x, shares, ids)
    torch.testing.assert_close(
        found.double(), one_at_a_time(weights, x, shares, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_experts_with_their_scales(scheme):
    layer, meant, named = FakeLayer(), {}, []
    for name, weight in weights_of().items():
        values, scale, meant[name] = quantize(weight, scheme)
        parts = {
            **pack(values, FORMAT_BITMASK, name, bits=4 if scheme == "int4" else None),
            "weight_scale": scale,
        }
        named += [(f"{name}.{part}", tensor) for part, tensor in parts.items()]
    method = method_of(layer, FORMAT_BITMASK, quantized=True)
    [*layer.load_weights(named)]
    method.process_weights_after_loading(layer)
    assert f"{scheme} kernel" in method.decisions["a.experts"].kernel
    x, shares, ids = routed(6)
    found = method.apply(layer, x, shares, ids)
    torch.testing.assert_close(
        found.double(), one_at_a_time(meant, x, shares, ids), rtol=1e-2, atol=1e-2
    )


def summed(layers: list[tuple[FakeLayer, int, int]]) -> None:
    """The ranks' results sum to the whole; `layers` with their number of ranks and of experts."""
    weights, total = weights_of(), torch.zeros(4, HIDDEN, dtype=torch.float64)
    x, shares, ids = routed(4)
    for layer, size, count in layers:
        method = method_of(layer, FORMAT_BITMASK, size=size, count=count)
        load(layer, weights, FORMAT_BITMASK)
        method.process_weights_after_loading(layer)
        assert len(layer.sparse_experts.up) == count
        total += method.apply(layer, x, shares, ids)
    torch.testing.assert_close(total, one_at_a_time(weights, x, shares, ids), rtol=1e-4, atol=1e-4)


def test_tensor_parallel_ranks():
    summed([(FakeLayer(rank, 3), 3, EXPERTS) for rank in range(3)])


def test_expert_parallel_ranks():
    """Also in another order than the checkpoint's."""
    maps = [0, -1, 1, -1, -1], [-1, 1, -1, 2, 0]
    summed([(FakeLayer(local=local), 1, max(local) + 1) for local in maps])


class Dense:
    """In place of vLLM's method: what it is given, and that sizes may be rounded up."""

    def __init__(self, moe: Any) -> None:
        self.finished = False

    def maybe_roundup_sizes(
        self, hidden: int, width: int, dtype: Any, parallel: Any
    ) -> tuple[int, int]:
        return hidden, 128

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, **others: Any) -> None:
        self.sizes = (num_experts, hidden_size, others["intermediate_size_per_partition"])

    def process_weights_after_loading(self, layer: Any) -> None:
        self.finished = True


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("kernels", "dense because switched off by a test"),
        ("activation", "dense because experts with the activation relu2 have no sparse kernel"),
        (
            "router",
            "dense because experts with biases, LoRA, weighted inputs or load balancing have no sparse "
            "kernel",
        ),
        ("one stored dense", "dense because some of its experts are stored dense"),
        ("too dense", "dense because it is more than half stored"),
    ],
)
def test_where_they_cannot_run_sparse_all_are_expanded_for_vllm(monkeypatch, why, reason):
    monkeypatch.setattr(experts, "UnquantizedFusedMoEMethod", Dense)
    layer, weights = FakeLayer(), weights_of()
    if why == "kernels":
        without_kernels(monkeypatch)
    elif why == "activation":
        layer.activation = MoEActivation.RELU2
    elif why == "router":
        layer.apply_router_weight_on_input = True
    elif why == "too dense":
        monkeypatch.setitem(BACKENDS, "cpu", fake_backend)
        weights["4.down_proj"] = torch.ones(HIDDEN, WIDTH)
    method = method_of(layer, FORMAT_BITMASK)
    alone = {"2.up_proj": weights.pop("2.up_proj")} if why == "one stored dense" else {}
    load(layer, weights, FORMAT_BITMASK)
    [*layer.load_weights((f"{name}.weight", weight) for name, weight in alone.items())]
    method.process_weights_after_loading(layer)
    assert method.decisions["a.experts"].reason == reason
    weights |= alone
    assert layer.loaded.keys() == {f"{name}.weight" for name in weights}
    assert all(
        torch.equal(layer.loaded[f"{name}.weight"], weight) for name, weight in weights.items()
    )
    assert isinstance(layer.quant_method, Dense)
    assert layer.quant_method.sizes == (EXPERTS, HIDDEN, 128)
    assert layer.quant_method.finished
    assert (
        layer.moe_config.intermediate_size_per_partition
        == layer.intermediate_size_per_partition
        == 128
    )
    assert not hasattr(layer, "sparse_experts")


def test_a_missing_expert_and_one_of_another_size_are_named():
    for damage, message in (
        (lambda w: w.pop("3.down_proj"), r"^a\.experts\.3\.down_proj: missing from the checkpoint"),
        (
            lambda w: w.update({"1.up_proj": w["1.up_proj"][:, :32].contiguous()}),
            r"^a\.experts\.1\.up_proj: the checkpoint has a weight \[96, 32\], the model's config.json has \[96, 64\]",
        ),
    ):
        layer, weights = FakeLayer(), weights_of()
        method = method_of(layer, FORMAT_BITMASK)
        damage(weights)
        load(layer, weights, FORMAT_BITMASK)
        with pytest.raises(RacError, match=message):
            method.process_weights_after_loading(layer)


def test_experts_that_are_loaded_again_are_refused():
    layer, weights = FakeLayer(), weights_of(True)
    method = method_of(layer, FORMAT_24)
    load(layer, weights, FORMAT_24)
    method.process_weights_after_loading(layer)
    with pytest.raises(
        RacError, match=r"^a\.experts: packed weights cannot be loaded into a running server again"
    ):
        load(layer, weights, FORMAT_24)


def packed(weights: dict[str, torch.Tensor]) -> PackedExperts:
    """Experts that are packed directly."""
    parts = [
        (
            (
                cpu,
                from_dense(torch.cat([weights[f"{i}.gate_proj"], weights[f"{i}.up_proj"]]), "up"),
            ),
            (cpu, from_dense(weights[f"{i}.down_proj"], "down")),
        )
        for i in range(EXPERTS)
    ]
    return PackedExperts("experts", parts, torch.nn.functional.silu, torch.float32)


def test_a_token_gets_the_same_alone_in_a_batch_and_compiled():
    experts, (x, shares, ids) = packed(weights_of()), routed(6)
    batch = experts(x, shares, ids)
    alone = [experts(x[at, None], shares[at, None], ids[at, None]) for at in range(6)]
    torch.testing.assert_close(batch, torch.cat(alone), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, shares, ids), batch)
    nobody = torch.zeros(0, CHOSEN)
    assert experts(torch.zeros(0, HIDDEN), nobody, nobody.int()).shape == (0, HIDDEN)


def test_two_models_in_one_process_keep_their_experts():
    others = {name: 2 * weight for name, weight in weights_of().items()}
    first, second = packed(weights_of()), packed(others)
    assert (first.name, second.name) == ("experts", "experts#2")
    x, shares, ids = routed(5)
    for model, weights in ((first, weights_of()), (second, others)):
        expected = one_at_a_time(weights, x, shares, ids)
        torch.testing.assert_close(model(x, shares, ids).double(), expected, rtol=1e-4, atol=1e-3)
    del first, model
    assert packed(others).name == "experts"  # free again
