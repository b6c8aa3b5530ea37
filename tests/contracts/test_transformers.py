"""What this package takes for granted about transformers, one test per seam."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import GenerationConfig, PreTrainedModel, Qwen3ForCausalLM
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
    config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    assert issubclass(config, upstream.CompressedTensorsConfig)
    config = auto.AutoQuantizationConfig.from_dict({"quant_method": METHOD, "format": "dense"})
    assert type(config) is auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD]
    assert type(auto.AutoHfQuantizer.from_config(config)) is auto.AUTO_QUANTIZER_MAPPING[METHOD]


UNKNOWN = """
import sys
from transformers import AutoModelForCausalLM
assert "rac_modifier" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "packed sparse: import rac_modifier" in str(error)
    print("refused")
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[2])
print(bool((loaded.model.layers[0].mlp.up_proj.weight == 0).any()))
"""


def test_seam_an_unknown_method_is_skipped_with_a_warning(tmp_path):
    """Why packed checkpoints say "compressed-tensors": "rac" would start the weights at random.

    With "compressed-tensors" they are refused for an entry of a type that upstream does not take.
    """
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    folders = [str(tmp_path / method) for method in (METHOD, "rac")]
    for folder in map(Path, folders):
        model.save_pretrained(folder)
        pack_checkpoint(folder, {"model.layers.0.mlp.up_proj": "unstructured"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["quant_method"] = folder.name
        (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", UNKNOWN, *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got rac" in result.stderr
    assert result.stdout.split() == ["refused", "False"], "no pruned weight is left"


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


def test_seam_upstreams_quantizer_has_no_name_that_is_ours():
    ours = {"_sparsity", "_only_packed", "load_packed"}
    plain = CompressedTensorsHfQuantizer(upstream.CompressedTensorsConfig())
    assert not ours & (set(dir(plain)) | set(vars(plain)))
    config = upstream.CompressedTensorsConfig()
    assert not hasattr(config, "sparsity")
    assert not hasattr(config, "schemes")


def test_seam_hooks_of_a_quantizer_and_their_order(tmp_path, monkeypatch):
    """Before the weights with their files, then the conversions, then after the weights."""
    calls = []
    model = tiny_model()
    model.config.quantization_config = {"quant_method": METHOD, "format": "dense"}
    model.save_pretrained(tmp_path)

    def spy(name):
        def hook(self, first, *args, **kwargs):
            calls.append((name, kwargs))
            return first  # upstream's own hooks need a config group

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
        (HfQuantizer, "_process_model_before_weight_loading", ["self", "model", "kwargs"]),
        (HfQuantizer, "_process_model_after_weight_loading", ["self", "model", "kwargs"]),
        (
            PreTrainedModel,
            "_load_pretrained_model",
            ["model", "state_dict", "checkpoint_files", "load_config", "expected_keys"],
        ),
    ],
)
def test_seam_signatures(owner, name, parameters):
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


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


def test_seam_a_state_dict_is_indexed_like_slices_of_files(tmp_path, monkeypatch):
    """Why packed tensors can be unpacked where they are taken; an error is raised as it is."""
    state = tiny_model().state_dict()
    tiny_model().save_pretrained(tmp_path)
    inner, indexed = PreTrainedModel._load_pretrained_model, []

    class Lazy:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, index):
            indexed.append(index)
            if self.name == "model.norm.weight":
                raise LookupError("ours")
            return state[self.name]

        def get_dtype(self):
            return "F32"

    def load(model, state_dict, checkpoint_files, load_config, *rest):
        assert state_dict is None
        assert replace(load_config, hf_quantizer=None) == load_config
        lazy = {name: Lazy(name) for name in state}
        return inner(model, lazy, checkpoint_files, load_config, *rest)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(load))
    with pytest.raises(LookupError, match="ours"):
        Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert set(indexed) == {...}


def test_seam_a_generation_config_is_checked_when_it_is_saved(tmp_path):
    """If this fails: a model is saved with the config that it was loaded with."""
    config = GenerationConfig(do_sample=False, temperature=0.6)
    with pytest.raises(ValueError, match="temperature"):
        config.save_pretrained(tmp_path)
