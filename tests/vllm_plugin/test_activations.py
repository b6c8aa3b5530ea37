"""In how many bits activations are multiplied: what the checkpoint records, and RAC_ACTIVATIONS."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.checkpoint.sparsity_config import with_int8_activations, with_packed  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.support import library_and_isa, support  # noqa: E402
from rac_modifier.vllm_plugin import activations, quant_config  # noqa: E402
from rac_modifier.vllm_plugin.activations import activation_bits, wanted_bits  # noqa: E402
from tests.vllm_plugin.layer_kinds import (  # noqa: E402
    finish,
    load,
    make,
    quantized,
    quantized_config,
    weights_of,
)

needs_kernels = pytest.mark.skipif(support().isa is None, reason="no compiled kernels")


@pytest.fixture(autouse=True)
def _nothing_requested(monkeypatch):
    monkeypatch.delenv("RAC_ACTIVATIONS", raising=False)


def test_what_the_environment_requests(monkeypatch):
    for value, wanted in (("", None), ("int8", 8), ("int16", 16)):
        monkeypatch.setenv("RAC_ACTIVATIONS", value)
        assert wanted_bits() == wanted
        assert activation_bits(recorded=True) == (wanted or 8)
        assert activation_bits() == (wanted or 16)
    monkeypatch.setenv("RAC_ACTIVATIONS", "8")
    with pytest.raises(
        RacError, match='RAC_ACTIVATIONS="8": activations can be int8 or int16; unset it'
    ):
        wanted_bits()


def loaded(kind: str, recorded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    """A layer of int8 weights of which these modules are recorded, after loading, and its dense weight."""
    on_rank(monkeypatch, 0, 1)
    config = quantized_config(FORMAT_BITMASK)
    config.layers = replace(config.layers, int8_activations=recorded)
    layer, dense = make(kind, config), []
    for shard, module, weight in weights_of(kind, False):
        values, scale, meant = quantized(weight, "int8")
        load(layer, shard, {**pack(values, FORMAT_BITMASK, module), "weight_scale": scale})
        dense.append(meant)
    finish(layer)
    return layer, dense


def bits_of(layer) -> int:
    library, isa = library_and_isa()
    return library.activation_bits(layer.weight_packed.data, isa)


@needs_kernels
@pytest.mark.parametrize(
    ("recorded", "requested", "bits"),
    [
        (("a.q", "a.k", "a.v"), None, 8),
        (("a.q", "a.k"), None, 16),  # a fused layer has one input
        ((), None, 16),
        (("a.q", "a.k", "a.v"), "int16", 16),
        ((), "int8", 8),
    ],
)
def test_a_fused_layer_takes_8_bits_where_all_parts_do(recorded, requested, bits, monkeypatch):
    if requested:
        monkeypatch.setenv("RAC_ACTIVATIONS", requested)
    layer, _ = loaded("qkv", recorded, monkeypatch)
    isa = support().isa
    assert bits_of(layer) == (
        bits if isa in ("avxvnni", "avx512", "amx", "dotprod", "i8mm", "sve") else 16
    )
    decision = layer.quant_method.summary.decisions["a.qkv"]
    assert ("activations in" in decision.kernel) == (bits == 8)


@needs_kernels
def test_the_product_of_a_layer_with_8_bits(monkeypatch):
    layer, (dense,) = loaded("column", ("a.column",), monkeypatch)
    x = torch.randn(5, dense.shape[1], generator=torch.Generator().manual_seed(0))
    found, exact = layer.quant_method.apply(layer, x), x @ dense.T
    error = float((found - exact).norm() / exact.norm())
    assert error < 0.02
    assert error > 1e-3 or bits_of(layer) == 16  # it is rounded


def hf_config(**record) -> SimpleNamespace:
    written = with_packed({}, FORMAT_BITMASK, {"model.a": "unstructured"}, 0.5, [])
    return SimpleNamespace(
        rac_sparsity=with_int8_activations(written, ["model.a"])["rac_sparsity"] | record
    )


def test_the_record_of_config_json_is_read_and_renamed(monkeypatch, tmp_path):
    from vllm.model_executor.models.utils import WeightsMapper

    monkeypatch.setattr(quant_config, "check_index", lambda folder: None)
    config = quantized_config(FORMAT_BITMASK)
    config.maybe_update_config("model", hf_config())
    assert config.layers.int8_activations == ("model.a",)
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language_model."}).get_rename_mapper()
    )
    assert config.layers.int8_activations == ("language_model.a",)
    with pytest.raises(
        RacError, match=r"rac_sparsity\.int8_activations is 'model.a', not a list of module names"
    ):
        config.maybe_update_config("model", hf_config(int8_activations="model.a"))


def test_a_request_without_effect_is_refused(monkeypatch):
    monkeypatch.setattr(quant_config, "check_index", lambda folder: None)
    monkeypatch.setenv("RAC_ACTIVATIONS", "int8")
    floats = quant_config.RacSparseConfig.from_config(
        with_packed({}, FORMAT_BITMASK, {"model.a": "unstructured"}, 0.5, [])["quantization_config"]
    )
    with pytest.raises(
        RacError,
        match="RAC_ACTIVATIONS: the weights of this checkpoint are floats, and activations",
    ):
        floats.maybe_update_config("model", hf_config())


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_8_bits_are_refused_where_no_kernel_multiplies_bytes(monkeypatch, isa):
    monkeypatch.setenv("RAC_ACTIVATIONS", "int8")
    monkeypatch.setattr(
        activations, "support", lambda: SimpleNamespace(isa=isa, reason="some kernel")
    )
    with pytest.raises(
        RacError,
        match=r"RAC_ACTIVATIONS=int8: only CPU kernels .* here: this is not a CPU; unset it",
    ):
        activations.check_effect(integers=True, on_cpu=False)
    if isa == "avx512":
        activations.check_effect(integers=True, on_cpu=True)
        return
    with pytest.raises(
        RacError,
        match=r"multiply bytes \(.*avx512.*\) take activations of 8 bits; here: some kernel; unset",
    ):
        activations.check_effect(integers=True, on_cpu=True)
