"""Pruned tiny models, quantized or not, and comparisons to the bit."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PackedFiles
from tests import tiny
from tests.tiny import linears

# What the fixture `saved` gives back: save(...) -> folder, state dict, mask structures.
Saved = Callable[..., tuple[Path, dict[str, torch.Tensor], dict[str, str]]]
Q = "model.layers.0.self_attn.q_proj"


def tiny_model(tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """With weights as small as real ones, and 96 = 3 x 32 columns in down_proj."""
    model = tiny.tiny_model(
        vocab_size=128,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.02,
    ).to(dtype)
    model.config.dtype = dtype
    model.generation_config.eos_token_id = 7
    return model


def prune_24(weight: torch.Tensor) -> None:
    groups = weight.view(-1, 4)
    groups.scatter_(1, groups.abs().float().topk(2, dim=1, largest=False).indices, 0.0)


def prune_half(weight: torch.Tensor) -> None:
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0.0


PRUNERS = {"2:4": prune_24, "unstructured": prune_half}
CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def grouped(bits: int, symmetric: bool = True, **changes: object) -> dict[str, dict]:
    """A config group of codes in groups of 32 columns."""
    arguments = {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    return {"weights": {**arguments, **changes}}


# Config groups of compressed-tensors; the comment is what upstream stores a weight as.
SCHEMES: dict[str, dict] = {
    "w8a8": {"weights": CHANNEL, "input_activations": TOKEN},  # int8
    "w8": {"weights": CHANNEL},  # int32 words of four values
    "w4": grouped(4),  # words of eight values
    "fp8": {  # float8_e4m3fn
        "weights": {**CHANNEL, "type": "float"},
        "input_activations": {**TOKEN, "type": "float"},
    },
}


def save_rounded(model: PreTrainedModel, folder: Path, scheme: dict, ignore=("lm_head",)) -> None:
    """Round to the nearest codes of a config group, and save in upstream's dense layout."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        args, weight = module.quantization_scheme.weights, module.weight.float()
        parts = weight.view(len(weight), -1, args.group_size or weight.shape[1])
        whole = None
        if args.strategy == "tensor_group":
            whole = generate_gparam(weight.amin(), weight.amax())
            module.weight_global_scale.data.copy_(whole)
        if hasattr(module, "input_global_scale"):
            module.input_global_scale.data.copy_(torch.rand(1) + 1)
        scale, zero = calculate_qparams(parts.amin(dim=2), parts.amax(dim=2), args, whole)
        scale = scale.amax() if args.strategy == "tensor" else scale
        module.weight_scale.data.copy_(scale.to(torch.bfloat16))
        if hasattr(module, "weight_zero_point"):
            point = module.weight_zero_point.data
            point.copy_(zero if zero.shape == point.shape else 0)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def save_quantized(folder: Path, structure: str, scheme: str) -> dict[str, str]:
    """Save a pruned, quantized model in upstream's dense layout; return structures by module."""
    model = tiny_model(tied=False)
    for module in linears(model).values():
        PRUNERS[structure](module.weight.data)
    modules = dict.fromkeys(linears(model), structure)
    save_rounded(model, folder, SCHEMES[scheme])
    return modules


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def assert_same_state(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert same_bits(tensor, expected[name]), name


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint; a packed weight as `<module>.weight`, its codes as int8."""
    with TensorFiles(folder) as files:
        packed = PackedFiles(files, config_of(folder))
        modules = packed.modules
        tensors = {f"{name}.weight": packed.weight(name).dense() for name in modules}
        others = (name for name in files.where if name.rpartition(".")[0] not in modules)
        scales = (f"{name}.weight_scale" for name in modules if f"{name}.weight_scale" in files)
        return tensors | {name: files.tensor(name) for name in [*others, *scales]}


def assert_restores(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    actual = dense_tensors(folder)
    assert actual.keys() == expected.keys() - ({"lm_head.weight"} - actual.keys())
    for name, tensor in actual.items():
        assert same_bits(tensor, expected[name]), name


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@contextmanager
def edited(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Let the tensors of a single-file checkpoint be changed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    path.unlink()  # the tensors are still mapped from it
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


@contextmanager
def edited_config(folder: Path) -> Iterator[dict]:
    """Let config.json be changed."""
    config = config_of(folder)
    yield config
    (folder / "config.json").write_text(json.dumps(config))


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Write a checkpoint of these tensors with this config.json."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stock(folder: Path, **kwargs: object) -> PreTrainedModel:
    """As transformers loads it without this package."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    method = "compressed-tensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, method, CompressedTensorsConfig)
        patch.setitem(auto.AUTO_QUANTIZER_MAPPING, method, CompressedTensorsHfQuantizer)
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
