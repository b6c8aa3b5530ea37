"""What this package takes for granted about transformers, one test per seam: an upgrade that moves
one fails here."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel, Qwen3ForCausalLM
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as upstream

import rac_modifier  # noqa: F401
from rac_modifier.checkpoint.packing import pack_checkpoint
from tests.tiny import tiny_model

METHOD = "compressed-tensors"


def test_seam_the_two_tables_that_from_pretrained_looks_into():
    assert issubclass(auto.AUTO_QUANTIZER_MAPPING[METHOD], CompressedTensorsHfQuantizer)
    assert issubclass(
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], upstream.CompressedTensorsConfig
    )
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": METHOD, "format": "dense"})
    assert type(config) is auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    assert type(auto.AutoHfQuantizer.from_config(config)) is auto.AUTO_QUANTIZER_MAPPING[METHOD]


UNKNOWN = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "rac_modifier" not in sys.modules
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(bool((loaded.model.layers[0].mlp.up_proj.weight == 0).any()))
"""


def test_seam_an_unknown_method_is_skipped_with_a_warning(tmp_path):
    """Why packed checkpoints say "compressed-tensors": "rac" would start the weights at random."""
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    model.save_pretrained(tmp_path)
    pack_checkpoint(tmp_path, {"model.layers.0.mlp.up_proj": "unstructured"})
    config = json.loads((tmp_path / "config.json").read_text())
    for method, refused in ((METHOD, True), ("rac", False)):
        config["quantization_config"]["quant_method"] = method
        (tmp_path / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-c", UNKNOWN, str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode != 0) == refused, result.stderr
    assert "Unknown quantization type, got rac" in result.stderr
    assert result.stdout.strip() == "False"  # no pruned weight is left


def test_seam_a_taken_name_cannot_be_registered():
    """Why the entries are replaced in the tables themselves."""
    with pytest.raises(ValueError, match="already registered"):
        auto.register_quantizer(METHOD)(CompressedTensorsHfQuantizer)
    with pytest.raises(ValueError, match="already registered"):
        auto.register_quantization_config(METHOD)(upstream.CompressedTensorsConfig)


def test_seam_a_users_config_is_compared_by_its_class_name():
    """Why our config class has upstream's name."""
    ours = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    assert ours is not upstream.CompressedTensorsConfig
    given = upstream.CompressedTensorsConfig(dequantize=True)
    merged = auto.AutoHfQuantizer.merge_quantization_configs({"quant_method": METHOD}, given)
    assert type(merged) is ours
    assert merged.dequantize
    other = type("Other", (upstream.CompressedTensorsConfig,), {})()
    with pytest.raises(ValueError, match="quantized with"):
        auto.AutoHfQuantizer.merge_quantization_configs({"quant_method": METHOD}, other)


def test_seam_upstreams_config_drops_the_sparsity_config():
    """Why a config class is needed; when upstream keeps it again, ours can go."""
    config = upstream.CompressedTensorsConfig.from_dict(
        {"quant_method": METHOD, "sparsity_config": {"format": "sparse-bitmask"}}
    )
    assert not hasattr(config, "sparsity_config")
    assert "sparsity_config" not in config.to_dict()


def test_seam_upstreams_quantizer_has_no_name_that_is_ours():
    ours = {"_sparsity", "_unpack", "_int32_modules", "_misfits"}
    plain = CompressedTensorsHfQuantizer(upstream.CompressedTensorsConfig())
    assert not ours & (set(dir(plain)) | set(vars(plain)))
    assert not hasattr(upstream.CompressedTensorsConfig(), "sparsity")


def test_seam_hooks_of_a_quantizer_and_their_order(tmp_path: Path, monkeypatch):
    """Before the weights with the files that were found, then the conversions, then after the
    weights."""
    calls = []
    model = tiny_model()
    model.config.quantization_config = {"quant_method": METHOD, "format": "dense"}
    model.save_pretrained(tmp_path)

    def spy(name):
        inner = getattr(CompressedTensorsHfQuantizer, name)

        def hook(self, *args, **kwargs):
            calls.append((name, kwargs))
            if name == "_process_model_before_weight_loading":
                return None  # upstream's own needs a config group
            return inner(self, *args, **kwargs)

        monkeypatch.setattr(CompressedTensorsHfQuantizer, name, hook)

    hooks = (
        "_process_model_before_weight_loading",
        "update_weight_conversions",
        "_process_model_after_weight_loading",
    )
    for name in hooks:
        spy(name)
    Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert [name for name, _ in calls] == list(hooks)
    assert [Path(file).name for file in calls[0][1]["checkpoint_files"]] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (HfQuantizer, "update_weight_conversions", ["self", "weight_conversions"]),
        (HfQuantizer, "_process_model_before_weight_loading", ["self", "model", "kwargs"]),
        (HfQuantizer, "_process_model_after_weight_loading", ["self", "model", "kwargs"]),
        (WeightConverter, "__init__", ["self", "source_patterns", "target_patterns", "operations"]),
        (WeightConverter, "convert", ["self", "layer_name", "model"]),
        (ConversionOps, "convert", ["self", "input_dict", "source_patterns", "target_patterns"]),
        (PreTrainedModel, "_get_dtype_plan", ["self", "dtype"]),
        (PreTrainedModel, "get_parameter_or_buffer", ["self", "target"]),
    ],
)
def test_seam_signatures(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters)[: len(parameters)] == parameters


def test_seam_a_quantizer_that_dequantizes_leaves_an_ordinary_model():
    """What our quantizer does for a model that is packed and not quantized."""
    quantizer = auto.AUTO_QUANTIZER_MAPPING[METHOD](
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](dequantize=True)
    )
    model = tiny_model()
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    quantizer.postprocess_model(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert model.is_quantized is False


class Failing(ConversionOps):
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        raise ValueError("ours")


def test_seam_an_error_of_an_operation_is_turned_into_another_one(tmp_path: Path, monkeypatch):
    """Why errors are kept and raised after loading; when transformers raises them as they are, that
    can go."""
    tiny_model().save_pretrained(tmp_path)
    made = WeightConverter([r"norm\.weight$"], "norm.weight", operations=[Failing()])
    monkeypatch.setattr(
        "transformers.modeling_utils.get_model_conversion_mapping", lambda *args: [made]
    )
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)


def test_seam_an_operation_that_returns_nothing_leaves_its_weight_missing():
    converter = WeightConverter(
        ["a"], "b", operations=[SimpleNamespace(convert=lambda *args, **kwargs: {})]
    )
    converter.collected_tensors = defaultdict(list, {"a": [torch.zeros(1)]})
    assert converter.convert("layer.b") == {}


def test_seam_full_names_that_an_operation_returns_are_kept():
    tensors = {"layer.b": torch.zeros(1), "layer.c": torch.ones(1)}
    converter = WeightConverter(
        ["a"], "b", operations=[SimpleNamespace(convert=lambda *args, **kwargs: dict(tensors))]
    )
    assert converter.convert("layer.b").keys() == tensors.keys()


def test_seam_a_converter_is_copied_for_each_tensor_with_its_operations():
    class Shared(Failing):
        def __deepcopy__(self, memo):
            return self

    shared = Shared()
    copied = copy.deepcopy(WeightConverter(["a"], "b", operations=[shared]))
    assert copied.operations[0] is shared
    assert copied.source_patterns == ["a"]


def test_seam_what_a_converter_of_experts_is_made_of():
    converter = WeightConverter(
        ["experts.*.up.weight"], "experts.up_proj", operations=[Concatenate(dim=0)]
    )
    assert converter.source_patterns == ["experts.*.up.weight"]
    assert converter._original_target_patterns == ["experts.up_proj"]
    assert converter._original_source_patterns == ["experts.*.up.weight"]
    assert (converter.scope_prefix, converter.base_model_prefix) == (None, None)
    assert converter.compiled_sources.search("model.experts.3.up.weight")
    converter.collected_tensors = defaultdict(list, {"x": [torch.zeros(1)]})
    assert converter.materialize_tensors().keys() == {"x"}  # tensors are passed on as they are
    assert converter.collected_tensors == {}


def test_seam_a_group_in_a_source_pattern_is_put_into_the_target():
    converter = WeightConverter(
        [r"^(a\.b|c)\.bits$", r"^(a\.b|c)\.values$"], r"\1.words", operations=[Failing()]
    )
    assert rename_source_key("a.b.values", [], [converter]) == ("a.b.words", r"^(a\.b|c)\.values$")
    assert rename_source_key("x.c.values", [WeightRenaming("x", "y")], [converter]) == (
        "y.c.values",
        None,
    )


def test_seam_with_a_quantizer_shapes_are_not_compared_and_renamed_tensors_not_cast():
    """Why both are done here."""
    from transformers import core_model_loading as loading

    assert "param_value.shape != expected_shape and hf_quantizer is None" in inspect.getsource(
        loading.set_param_for_module
    )
    source = inspect.getsource(loading.convert_and_load_state_dict_in_model)
    assert "original_key != renamed_key" in source
    assert "_dtype = None" in source


def test_seam_the_conversions_that_a_load_used_are_reversed_by_save_pretrained(tmp_path: Path):
    """Why ours are taken away after loading."""
    tiny_model().save_pretrained(tmp_path)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert model._weight_conversions == []
    model._weight_conversions = [WeightConverter(["a"], r"norm\.weight$", operations=[Failing()])]
    with pytest.raises(NotImplementedError):
        model.save_pretrained(tmp_path / "again")


def test_seam_modules_that_stay_in_float32():
    model = tiny_model()
    assert model._get_dtype_plan(torch.bfloat16) == {}
    model._keep_in_fp32_modules_strict = ["q_proj"]
    assert model._get_dtype_plan(torch.bfloat16) == {"q_proj": torch.float32}
    pattern, names, _ = build_glob_alternation(["q_proj"])
    assert names[pattern.search("layers.0.q_proj.weight").lastgroup] == "q_proj"
