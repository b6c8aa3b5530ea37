"""One test per place where the plugin depends on vLLM, named after it."""

import dataclasses
import importlib.metadata
import inspect
from fractions import Fraction
from typing import get_args

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, save_model

needs_vllm()

from vllm.model_executor.layers import linear, quantization

from rac_modifier.cli.doctor import TESTED
from rac_modifier.errors import RacError
from rac_modifier.runtime.files import read_json
from rac_modifier.vllm_plugin.config import RacConfig
from rac_modifier.vllm_plugin.register import METHOD, register
from tests.vllm_plugin.stored_forms import PACKED


@pytest.fixture(autouse=True)
def registered():
    register()


def test_entry_point_group():
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    ours = [
        e.value
        for e in importlib.metadata.entry_points(group=DEFAULT_PLUGINS_GROUP)
        if "rac_modifier" in e.value
    ]
    if not ours:
        pytest.skip("rac-modifier is not installed here, only on the path")
    assert set(ours) == {"rac_modifier.vllm_plugin.register:register"}


def test_the_versions_of_this_environment_are_those_that_doctor_calls_tested():
    names = TESTED["serving"][0]
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in names}
    assert versions in TESTED["serving"]


def test_register_quantization_config_twice():
    register()
    assert quantization.QUANTIZATION_METHODS.count(METHOD) == 1
    assert issubclass(quantization.get_quantization_config(METHOD), RacConfig)
    assert METHOD not in get_args(quantization.QuantizationMethods)


def test_override_quantization_method_comes_before_vllms_own():
    """`ModelConfig._verify_quantization` calls it for ours before its own methods."""
    from vllm.config import ModelConfig

    source = inspect.getsource(ModelConfig._verify_quantization)
    assert "override_quantization_method(" in source
    assert "quantization_methods + overrides" in source
    assert RacConfig.override_quantization_method(PACKED, None, hf_config=None) == METHOD


def test_without_a_quantization_config_get_quant_config_makes_an_empty_one():
    """`--quantization rac` on a model that is not quantized is refused with the next step."""
    from vllm.model_executor.model_loader import weight_utils

    assert RacConfig.get_config_filenames() == []
    assert "quant_cls()" in inspect.getsource(weight_utils.get_quant_config)
    with pytest.raises(RacError, match=r"--quantization rac: .* rac pack makes it sparse"):
        RacConfig()


def test_a_lost_tensor_or_file_is_noticed_before_loading(tmp_path):
    """vLLM looks for missing weights in unquantized models only."""
    from safetensors.torch import load_file, save_file
    from vllm.model_executor.model_loader import default_loader

    source = inspect.getsource(default_loader)
    assert "model_config.quantization is None and loaded_weights is not None" in source
    folder = save_model(tmp_path / "model", "qwen3", "2:4")
    config = RacConfig.from_config(read_json(folder / "config.json")["quantization_config"])
    config.maybe_update_config(str(folder))
    name = "model.layers.1.post_attention_layernorm.weight"
    path = folder / read_json(folder / "model.safetensors.index.json")["weight_map"][name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RacError, match=name):
        config.maybe_update_config(str(folder))
    path.unlink()
    with pytest.raises(RacError, match=path.name):
        config.maybe_update_config(str(folder))


def test_weight_loader_v2_is_registered():
    """Without it, the loaders of layers cut another parameter than they are given."""
    import rac_modifier.vllm_plugin.linear  # noqa: F401

    assert "RacLinearMethod" in linear.WEIGHT_LOADER_V2_SUPPORTED


def test_routed_experts_ask_their_method_for_weights_and_matmuls():
    """What `RacExpertsMethod` implements, and what it reads of the layer."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

    applied = list(inspect.signature(FusedMoEMethodBase.apply).parameters)
    assert applied == [
        "self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input",
    ]  # fmt: skip
    assert list(inspect.signature(RoutedExperts.load_weights).parameters) == ["self", "weights"]
    assert callable(RoutedExperts._replace_quant_method)
    assert isinstance(ExpertMapManager.expert_map, property)
    source = inspect.getsource(RoutedExperts.__init__)
    for name in (
        "activation", "apply_router_weight_on_input", "ckpt_down_proj_name", "ckpt_gate_proj_name",
        "ckpt_up_proj_name",
        "expert_map_manager", "global_num_experts", "hidden_size", "moe_config", "swiglu_limit",
    ):  # fmt: skip
        assert f"self.{name} = " in source or f"self.{name}, " in source, f"RoutedExperts.{name}"
    fields = {field.name for field in dataclasses.fields(FusedMoEConfig)}
    assert {
        "has_bias", "hidden_dim", "intermediate_size", "is_lora_enabled", "moe_parallel_config",
    } <= fields  # fmt: skip
    assert isinstance(FusedMoEConfig.tp_rank, property)


def test_a_draft_model_is_loaded_with_a_prefix():
    """`get_quant_method` takes it off."""
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.draft_model import DraftModelProposer

    from rac_modifier.vllm_plugin.config import DRAFT

    assert f'prefix="{DRAFT}"' in inspect.getsource(DraftModelProposer._get_model)
    assert "quantization" in {field.name for field in dataclasses.fields(SpeculativeConfig)}


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_vllms_own_scheme_takes_the_words_of_few_bits_as_docs_quantization_says(bits, symmetric):
    """Codes lie in words without gaps, so K columns take ceil(K bits / 32) of them."""
    from vllm.model_executor.kernels.linear import HummingLinearKernel
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsWNA16,
    )

    scheme = CompressedTensorsWNA16("group", bits, 64, symmetric=symmetric)
    assert scheme.pack_factor == Fraction(32, bits)
    assert "input_size_per_partition * self.num_bits / 32" in inspect.getsource(
        CompressedTensorsWNA16.create_weights
    )
    assert HummingLinearKernel.get_min_capability() == 75
    assert "size_bits" in inspect.getsource(HummingLinearKernel.process_weights_after_loading)
