"""Packed experts, compared with one token and expert at a time in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.formats.test_stored_weight import random_weight
from tests.kernels import fake_backend
from tests.vllm_plugin.vllm_fixtures import needs_vllm, without_kernels

needs_vllm()

from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, FORMATS
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import BACKENDS
from rac_modifier.kernels.cpu.support import support
from rac_modifier.vllm_plugin import experts
from rac_modifier.vllm_plugin.experts import RacExpertsMethod
from rac_modifier.vllm_plugin.layouts import CodesLayout, GptqAwqLayout, PackedLayout
from tests.vllm_plugin.stored_forms import (
    GROUP,
    int4,
    quantization,
    quantize,
    quantized_sparse,
    stored_words,
    words_config,
)
from tests.vllm_plugin.test_layouts import packed

pytestmark = pytest.mark.skipif(support().isa is None, reason=support().reason)
EXPERTS, HIDDEN, WIDTH, CHOSEN = 5, 64, 96, 2
SHAPES = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
Weights = dict[str, torch.Tensor]


class FakeLayer(torch.nn.Module):
    """What vLLM's layer of experts has that the method reads."""

    def __init__(self, rank: int = 0, size: int = 1, local: list[int] | None = None) -> None:
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
        expert_map = None if local is None else torch.tensor(local)
        self.expert_map_manager = SimpleNamespace(expert_map=expert_map)
        self.ckpt_gate_proj_name, self.ckpt_up_proj_name, self.ckpt_down_proj_name = SHAPES
        self.activation, self.swiglu_limit = MoEActivation.SILU, None
        self.apply_router_weight_on_input = False
        self.loaded: Weights = {}

    def load_weights(self, weights: Any) -> Any:
        for name, tensor in weights:
            self.loaded[name] = tensor
            yield name

    def _replace_quant_method(self, method: Any) -> None:
        self.quant_method = method


def weights_of(two_of_four: bool = False) -> Weights:
    return {
        f"{expert}.{name}": random_weight(*shape, 3 * expert + place, two_of_four)
        for expert in range(EXPERTS)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def method_of(layer: Any, format: str, quantized: bool = False, count: int = EXPERTS) -> Any:
    decisions: dict[str, Any] = {}
    config = quantized_sparse(format, "int8", []) if quantized else packed(format=format)
    reader = PackedLayout(config).packed
    method = RacExpertsMethod(layer, "a.experts", reader, decisions.__setitem__)
    method.decisions = decisions
    width = layer.moe_config.intermediate_size_per_partition
    method.create_weights(layer, count, HIDDEN, width, torch.float32, weight_loader=None)
    return method


def load(layer: Any, weights: Weights, format: str) -> None:
    """In two calls, as vLLM does for each file, with the parts mixed."""
    packed = {name: FORMATS[format].compress(weight, name) for name, weight in weights.items()}
    named = [(f"{name}.{part}", t) for name, parts in packed.items() for part, t in parts.items()]
    named.sort(key=lambda pair: pair[0].rpartition(".")[2])
    assert [*layer.load_weights(named[:20])] == []
    assert [*layer.load_weights(named[20:])] == []


def finished(layer: Any, weights: Weights, format: str = FORMAT_BITMASK, **options: Any) -> Any:
    method = method_of(layer, format, **options)
    load(layer, weights, format)
    method.process_weights_after_loading(layer)
    return method


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights that sum to one, and distinct experts of each token; expert 3 gets none."""
    ids = [torch.tensor([0, 1, 2, 4])[torch.randperm(4)[:CHOSEN]] for _ in range(tokens)]
    shares = torch.rand(tokens, CHOSEN).softmax(1)
    return torch.randn(tokens, HIDDEN), shares, torch.stack(ids).int()


def one_at_a_time(weights: Weights, x: Any, shares: Any, ids: Any) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for place in range(CHOSEN):
            gate, up, down = (weights[f"{ids[token, place]}.{name}"].double() for name in SHAPES)
            gated = gate @ x[token].double()
            gated = gated / (1 + torch.exp(-gated)) * (up @ x[token].double())
            out[token] += float(shares[token, place]) * (down @ gated)
    return out


def check(result: torch.Tensor, weights: Weights, routing: Any, tolerance: float = 1e-4) -> None:
    expected = one_at_a_time(weights, *routing)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("format", "tokens"), [(FORMAT_24, 1), (FORMAT_BITMASK, 7)])
def test_tokens_go_through_their_experts(format, tokens):
    layer, weights = FakeLayer(), weights_of(format == FORMAT_24)
    method = finished(layer, weights, format)
    decision = method.decisions["a.experts"]
    assert decision.sparse
    assert decision.kernel.endswith(", experts")
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == 2 * EXPERTS  # no dense copy
    assert all("weight_packed" in name for name in names)
    routing = routed(tokens)
    check(method.apply(layer, *routing), weights, routing)
    with pytest.raises(RacError, match=r"^a\.experts: packed weights cannot be loaded into a"):
        load(layer, weights, format)


def test_models_that_load_experts_by_the_names_of_parameters():
    """As DeepSeek's `load_weights`: w1 is the gate, w2 the down projection, w3 up."""
    layer, weights, routing = FakeLayer(), weights_of(), routed(4)
    method = method_of(layer, FORMAT_BITMASK)
    parameters, shards = (
        dict(layer.named_parameters()),
        dict(zip(SHAPES, ("w1", "w3", "w2"), strict=True)),
    )
    for module, weight in weights.items():
        expert, _, name = module.partition(".")
        prefix = "w2_" if name == "down_proj" else "w13_"
        for part, tensor in FORMATS[FORMAT_BITMASK].compress(weight, module).items():
            parameter = parameters[f"{prefix}{part}"]
            options = {"shard_id": shards[name], "expert_id": int(expert), "return_success": True}
            assert parameter.weight_loader(parameter, tensor, f"{prefix}{part}", **options)
    method.process_weights_after_loading(layer)
    assert {name.partition(".")[0] for name, _ in layer.named_parameters()} == {"sparse_experts"}
    check(layer.sparse_experts(*routing), weights, routing)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_experts_with_their_scales(scheme):
    layer, meant, named = FakeLayer(), {}, []
    for name, weight in weights_of().items():
        values, scale, meant[name] = quantize(weight, scheme)
        parts = FORMATS[FORMAT_BITMASK].compress(values, name, 4 if scheme == "int4" else None)
        named += [(f"{name}.{part}", t) for part, t in {**parts, "weight_scale": scale}.items()]
    method = method_of(layer, FORMAT_BITMASK, quantized=True)
    [*layer.load_weights(named)]
    method.process_weights_after_loading(layer)
    assert f"{scheme} kernel" in method.decisions["a.experts"].kernel
    routing = routed(6)
    check(method.apply(layer, *routing), meant, routing, 1e-2)


@pytest.mark.parametrize("form", ["int4", "int3", "int2", "gptq", "awq"])
def test_dense_experts_of_few_bits(form):
    layer, meant, named = FakeLayer(), {}, []
    for name, weight in weights_of().items():
        if form.startswith("int"):
            stored, meant[name] = int4(weight, bits=int(form[-1]))
        else:
            stored, meant[name] = stored_words(weight, GROUP, symmetric=True, form=form)
        named += [(f"{name}.{part}", tensor) for part, tensor in stored.items()]
    if form.startswith("int"):
        layout = CodesLayout(quantization(bits=int(form[-1])))
    else:
        layout = GptqAwqLayout(words_config(form, GROUP, True))
    reader = layout.experts_reader(layer, "a.experts")
    decisions: dict[str, Any] = {}
    method = RacExpertsMethod(layer, "a.experts", reader, decisions.__setitem__)
    method.create_weights(layer, EXPERTS, HIDDEN, WIDTH, torch.float32, weight_loader=None)
    assert [*layer.load_weights(named)] == []
    method.process_weights_after_loading(layer)
    assert decisions["a.experts"].sparse, decisions
    routing = routed(6)
    check(method.apply(layer, *routing), meant, routing, 1e-2)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [FakeLayer(rank, 3) for rank in range(3)],  # tensor parallel
        # Expert parallel, also in another order than the checkpoint's
        lambda: [FakeLayer(local=local) for local in ([0, -1, 1, -1, -1], [-1, 1, -1, 2, 0])],
    ],
)
def test_the_ranks_sum_to_the_whole(layers):
    weights, routing, total = weights_of(), routed(4), 0
    for layer in layers():
        local = layer.expert_map_manager.expert_map
        count = EXPERTS if local is None else int(local.max()) + 1
        method = finished(layer, weights, count=count)
        assert len(layer.sparse_experts.up) == count
        total = total + method.apply(layer, *routing).double()
    check(total, weights, routing)


class Dense:
    """Instead of vLLM's method: what it is given, and that sizes may be rounded up."""

    def __init__(self, moe: Any) -> None:
        self.finished = False

    def maybe_roundup_sizes(self, hidden: int, *others: Any) -> tuple[int, int]:
        return hidden, 128

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, **others: Any) -> None:
        self.sizes = (num_experts, hidden_size, others["intermediate_size_per_partition"])

    def process_weights_after_loading(self, layer: Any) -> None:
        self.finished = True


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("kernels", "switched off by a test"),
        ("activation", "experts with the activation relu2 have no kernel"),
        ("router", "experts with biases, LoRA, weighted inputs or load balancing have no kernel"),
        ("one in floats", "some of its experts are stored in floats"),
        ("too dense", "it is more than half stored"),
        (
            "two dtypes",
            "a.experts.2.up_proj cannot be fused with a.experts.2.gate_proj: their columns, their "
            "order, dtypes, bits, groups or zero points differ; quantize both in the same way",
        ),
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
    elif why == "two dtypes":
        weights["2.up_proj"] = weights["2.up_proj"].float()
    method = method_of(layer, FORMAT_BITMASK)
    alone = {"2.up_proj": weights.pop("2.up_proj")} if why == "one in floats" else {}
    load(layer, weights, FORMAT_BITMASK)
    [*layer.load_weights((f"{name}.weight", weight) for name, weight in alone.items())]
    method.process_weights_after_loading(layer)
    assert method.decisions["a.experts"].reason == f"dense because {reason}"
    expected = {f"{name}.weight": weight.float() for name, weight in (weights | alone).items()}
    assert layer.loaded.keys() == expected.keys()
    assert all(torch.equal(layer.loaded[name], weight) for name, weight in expected.items())
    assert layer.quant_method.sizes == (EXPERTS, HIDDEN, 128)
    assert layer.quant_method.finished
    assert layer.intermediate_size_per_partition == 128
    assert not hasattr(layer, "sparse_experts")


@pytest.mark.parametrize(
    ("name", "replacement", "says"),
    [
        ("3.down_proj", None, r"3\.down_proj: missing from the checkpoint"),
        ("1.up_proj", torch.ones(96, 32), r"1\.up_proj: the checkpoint has a weight \[96, 32\]"),
    ],
)
def test_a_missing_expert_and_one_of_another_size_are_named(name, replacement, says):
    weights = weights_of()
    del weights[name]
    if replacement is not None:
        weights[name] = replacement
    with pytest.raises(RacError, match=rf"^a\.experts\.{says}"):
        finished(FakeLayer(), weights)
