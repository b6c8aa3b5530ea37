"""Shared by the tests that need vLLM: layers on a simulated rank, and models served inside the test's process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

# One process, so that a test sees the layers; threads that wait do not spin.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
GROUP = 32  # columns that share a scale of 4-bit values
_PRUNED = (
    "proj.weight",
    ".w1.weight",
    ".w2.weight",
    ".w3.weight",
)  # Mixtral's experts have w1, w2 and w3
NEEDS_VLLM = "vllm is not installed here; run these in the serving environment: make test-serve"


def needs_vllm() -> None:
    """Skip the module if vLLM is not installed."""
    os.environ.update(ENVIRONMENT)
    pytest.importorskip("vllm", reason=NEEDS_VLLM)


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Layers that are created after this call are rank `rank` of `size`."""
    for module in ("vllm.model_executor.layers.linear", "vllm.model_executor.parameter"):
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the compiled kernels."""
    from rac_modifier.kernels.cpu import backend
    from rac_modifier.kernels.cpu.support import Support

    monkeypatch.setattr(backend, "support", lambda: Support(None, "switched off by a test"))


def save_model(
    folder: Path, kind: str, structure: str, packed: bool = True, **changes: Any
) -> Path:
    """A tiny random causal LM of a family (qwen2, qwen3, llama, qwen3_moe, mixtral), pruned, in bfloat16, sharded files."""
    import transformers

    from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint

    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    names = {
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "llama": "Llama",
        "qwen3_moe": "Qwen3Moe",
        "mixtral": "Mixtral",
    }
    if kind == "qwen2":  # hidden size over heads, and biases in QKV
        settings |= {"hidden_size": 128}
    if kind == "qwen3_moe":
        settings |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        }
    if kind == "mixtral":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{names[kind]}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(folder, max_shard_size="60KB")
    modules = prune_saved(folder, structure)
    if packed:
        ignored = [f"{name}" for name in saved_linears(folder) if name not in modules]
        pack_checkpoint(folder, modules, dense_linears=[*ignored, "lm_head"])
    else:
        mark_dense(folder, modules)
    return folder


def saved_linears(folder: Path) -> list[str]:
    """The linear modules of the saved files, each expert separately."""
    from rac_modifier.checkpoint.files import TensorFiles

    with TensorFiles(folder) as files:
        return sorted(
            name.removesuffix(".weight")
            for name in files.where
            if name.endswith((*_PRUNED, "gate.weight"))
        )


def prune_saved(folder: Path, structure: str) -> dict[str, str]:
    """Prune all but the first output projection and the routers, in the files."""
    from safetensors.torch import load_file, save_file

    modules = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith(_PRUNED) and name != "model.layers.0.self_attn.o_proj.weight":
                prune(tensor, structure)
                modules[name.removesuffix(".weight")] = structure
        save_file(tensors, path, {"format": "pt"})
    return modules


def save_quantized(
    folder: Path, meant: Path, structure: str, scheme: str, kind: str = "qwen3"
) -> None:
    """As `save_model`, with the pruned weights quantized ("int8", "fp8" or "int4"); `meant` gets them dense and dequantized."""
    from safetensors.torch import load_file, save_file

    from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack

    packed = save_model(folder, kind, structure, packed=False)
    shutil.copytree(packed, meant)
    format = FORMAT_24 if structure == "2:4" else FORMAT_BITMASK
    config = json.loads((folder / "config.json").read_text())
    modules = config.pop("rac_sparsity")["modules"]
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, dense = load_file(path), load_file(meant / path.name)
        for module in [
            name.removesuffix(".weight")
            for name in tensors
            if name.removesuffix(".weight") in modules
        ]:
            values, scale = quantize(tensors.pop(f"{module}.weight").float(), scheme)
            parts = pack(values, format, module, bits=4 if scheme == "int4" else None)
            tensors |= {
                f"{module}.{part}": tensor
                for part, tensor in {**parts, "weight_scale": scale}.items()
            }
            dense[f"{module}.weight"] = values.float() * scale.repeat_interleave(
                values.shape[1] // scale.shape[1], dim=1
            )
        save_file(tensors, path, {"format": "pt"})
        save_file(dense, meant / path.name, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config["quantization_config"] = quantization_config(
        format, scheme, sorted(set(saved_linears(meant)) - set(modules))
    )
    (folder / "config.json").write_text(json.dumps(config))
    (meant / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "quantization_config"})
    )


def quantization_config(format: str, scheme: str, ignore: list[str]) -> dict[str, Any]:
    """The entry that llm-compressor and packing write for it."""
    kind, bits = ("float", 8) if scheme == "fp8" else ("int", int(scheme[-1]))
    weights = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if bits == 4 else "channel",
    }
    if bits == 4:
        weights["group_size"] = GROUP
    inputs = (
        None if bits == 4 else {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True}
    )
    ignore = [*ignore, "lm_head"]
    return {
        "quant_method": "compressed-tensors",
        "format": {"int8": "int-quantized", "fp8": "float-quantized", "int4": "pack-quantized"}[
            scheme
        ],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
        "ignore": ignore,
        "sparsity_config": {"format": format, "targets": ["Linear"], "ignore": ignore},
    }


def quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (int8, also for 4 bits, or fp8) and scales float32 [N, groups] of a float weight [N, K]."""
    rows, columns = weight.shape
    groups = columns // GROUP if scheme == "int4" else 1
    most = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[scheme]
    scale = (weight.view(rows, groups, -1).abs().amax(-1) / most).clamp_min(1e-6)
    values = weight / scale.repeat_interleave(columns // groups, dim=1)
    return values.to(torch.float8_e4m3fn) if scheme == "fp8" else values.round().to(
        torch.int8
    ), scale


def prune(weight: torch.Tensor, structure: str) -> None:
    """Zero the smaller half, of each four columns or of all weights."""
    groups = weight.view(-1, 4) if structure == "2:4" else weight.view(1, -1)
    groups.scatter_(
        1, groups.abs().float().topk(groups.shape[1] // 2, dim=1, largest=False).indices, 0.0
    )


PROMPTS = [[5, 17, 40, 8], [60, 61, 62], [9] * 7, [33, 90, 12, 77, 30]]


def reference(folder: Path, tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers on the unpacked weights, in float32."""
    from rac_modifier.checkpoint.load import load_model

    return greedy(load_model(folder, dtype="float32"), tokens)


def greedy(model: Any, tokens: int) -> list[list[int]]:
    """Greedy tokens of a transformers model."""
    model.generation_config.eos_token_id = None
    return [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """A vLLM in this process; in float32 and eager by default."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from rac_modifier.vllm_plugin.register import register

    register()
    settings = {
        "gpu_memory_utilization": 0.2,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "skip_tokenizer_init": True,
    }
    model = LLM(str(folder), **{**settings, **options})
    try:
        yield model
    finally:
        del model
        cleanup_dist_env_and_memory()


def serve(folder: Path, tokens: int, **options: Any) -> tuple[list[list[int]], dict[str, str]]:
    """Greedy tokens of vLLM, and how each layer runs (`methods_of`)."""
    from vllm import SamplingParams

    with engine(folder, **options) as model:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        methods = {} if "tensor_parallel_size" in options else model.apply_model(methods_of)[0]
        return [list(output.outputs[0].token_ids) for output in outputs], methods


def served_log_probabilities(folder: Path, sequences: torch.Tensor, **options: Any) -> torch.Tensor:
    """The log-probability that vLLM gives each token of int64 [B, T] but the first, teacher-forced: [B, T - 1]."""
    from vllm import SamplingParams

    with engine(folder, **options) as model:
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": sequence} for sequence in sequences.tolist()]
        outputs = model.generate(prompts, params, use_tqdm=False)
    return torch.tensor(
        [
            [
                given[token].logprob
                for token, given in zip(sequence[1:], output.prompt_logprobs[1:], strict=True)
            ]
            for sequence, output in zip(sequences.tolist(), outputs, strict=True)
        ]
    )


def methods_of(model: torch.nn.Module) -> dict[str, str]:
    """How each linear layer, the experts and the head run: "packed", or the method's class."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (LinearBase, ParallelLMHead)):
            method = module.quant_method
            found[name] = "packed" if hasattr(module, "weight_packed") else type(method).__name__
            assert not (hasattr(module, "weight_packed") and hasattr(module, "weight")), (
                f"{name}: two copies"
            )
        if isinstance(module, RoutedExperts):
            found[name] = (
                "packed"
                if hasattr(module, "sparse_experts")
                else type(module.quant_method).__name__
            )
            assert not (hasattr(module, "sparse_experts") and hasattr(module, "w2_weight")), (
                f"{name}: two copies"
            )
    return found
