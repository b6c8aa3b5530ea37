"""Shared by the tests that need vLLM."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm_plugin.stored_forms import Stored, quantize, quantized_sparse

# One process, so that a test sees the layers; threads that wait do not spin.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Mixtral's experts have w1 to w3.
_PRUNED = ("proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")
_IGNORED = "model.layers.0.self_attn.o_proj"
NEEDS_VLLM = "vllm is not installed here; run these in the serving environment: make test-serve"
PROMPTS = [[5, 17, 40, 8], [60, 61, 62], [9] * 7, [33, 90, 12, 77, 30]]
_SETTINGS: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"hidden_size": 128}),  # hidden size over heads, and biases in QKV
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 64, "decoder_sparse_step": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def needs_vllm() -> None:
    """Skip the module if vLLM is not installed."""
    os.environ.update(ENVIRONMENT)
    pytest.importorskip("vllm", reason=NEEDS_VLLM)


def on_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Layers that are created after this call are rank `rank` of `size`."""
    for module in ("layers.linear", "layers.vocab_parallel_embedding", "parameter"):
        path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
        monkeypatch.setattr(f"{path}_rank", lambda: rank)
        monkeypatch.setattr(f"{path}_world_size", lambda: size)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the compiled kernels."""
    from rac_modifier.kernels import cpu
    from rac_modifier.kernels.cpu.support import Support

    off = Support(None, "switched off by a test")
    monkeypatch.setattr(cpu, "machine_support", lambda: off)


def save_model(
    folder: Path, kind: str, structure: str, packed: bool = True, **changes: Any
) -> Path:
    """A tiny random pruned model of a family, in bfloat16 and sharded files."""
    import transformers

    from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint

    name, settings = _FAMILIES[kind]
    config = getattr(transformers, f"{name}Config")(**{**_SETTINGS, **settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
    model.save_pretrained(folder, max_shard_size="60KB")
    modules = dict.fromkeys(set(saved_linears(folder, _PRUNED)) - {_IGNORED}, structure)
    rewrite(
        folder, None, list(modules), lambda weight: ({"weight": pruned(weight, structure)}, weight)
    )
    if packed:
        ignored = set(saved_linears(folder, (*_PRUNED, "gate.weight"))) - set(modules)
        pack_checkpoint(folder, modules, dense_linears=[*sorted(ignored), "lm_head"])
    else:
        mark_dense(folder, modules)
    return folder


def saved_linears(folder: Path, endings: tuple[str, ...] = (*_PRUNED, "gate.weight")) -> list[str]:
    """The linear modules of the saved files, each expert separately."""
    from rac_modifier.checkpoint.files import TensorFiles

    with TensorFiles(folder) as files:
        return sorted(n.removesuffix(".weight") for n in files.where if n.endswith(endings))


def rewrite(
    folder: Path, meant: Path | None, modules: list[str], store: Callable[[torch.Tensor], Stored]
) -> None:
    """Store weights anew, file by file; `meant`, a copy of the folder, gets them dense."""
    from safetensors.torch import load_file, save_file

    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        dense = {} if meant is None else load_file(meant / path.name)
        for name in [n for n in tensors if n.removesuffix(".weight") in modules]:
            module = name.removesuffix(".weight")
            stored, dense[name] = store(tensors.pop(name))
            tensors |= {f"{module}.{part}": tensor for part, tensor in stored.items()}
        save_file(tensors, path, {"format": "pt"})
        if meant is not None:
            save_file(dense, meant / path.name, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def pruned(weight: torch.Tensor, structure: str) -> torch.Tensor:
    """Zero the smaller half, of each four columns or of all weights."""
    weight = weight.clone()
    groups = weight.view(-1, 4) if structure == "2:4" else weight.view(1, -1)
    smaller = groups.abs().float().topk(groups.shape[1] // 2, dim=1, largest=False).indices
    groups.scatter_(1, smaller, 0.0)
    return weight


def set_entry(folder: Path, meant: Path, entry: dict[str, Any]) -> None:
    """Write a `quantization_config` instead of our record; `meant` gets neither."""
    config = json.loads((folder / "config.json").read_text())
    del config["rac_sparsity"]
    (meant / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    config["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(config))


def save_quantized(
    folder: Path, meant: Path, structure: str, scheme: str, kind: str = "qwen3"
) -> None:
    """A packed model with quantized weights ("int8", "fp8" or "int4"); `meant` gets them dense."""
    from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, FORMATS

    shutil.copytree(save_model(folder, kind, structure, packed=False), meant)
    format = FORMAT_24 if structure == "2:4" else FORMAT_BITMASK
    modules = list(json.loads((folder / "config.json").read_text())["rac_sparsity"]["modules"])

    def store(weight: torch.Tensor) -> Stored:
        values, scale, dense = quantize(weight.float(), scheme)
        parts = FORMATS[format].compress(values, "m", 4 if scheme == "int4" else None)
        return {**parts, "weight_scale": scale}, dense

    rewrite(folder, meant, modules, store)
    ignored = sorted({*saved_linears(meant)} - {*modules})
    set_entry(folder, meant, quantized_sparse(format, scheme, ignored))


def save_codes(folder, meant, entry, store, kind="qwen3", **changes):
    """A tiny model whose linear layers but one are stored by `store`; `meant` gets them dense."""
    shutil.copytree(save_model(folder, kind, "unstructured", packed=False, **changes), meant)
    modules = sorted(set(saved_linears(folder, _PRUNED)) - {_IGNORED})
    # pruned weights make groups of few values; these are not
    rewrite(folder, meant, modules, lambda weight: store(torch.randn(weight.shape) * 0.2))
    if "ignore" in entry:
        entry = {**entry, "ignore": [_IGNORED, "lm_head", r"re:.*mlp\.gate$"]}
    set_entry(folder, meant, entry)


def reference(folder: Path, tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers on the unpacked weights, in float32."""
    from rac_modifier.checkpoint.hf_quantizer import load_model

    return greedy(load_model(folder, dtype="float32"), tokens)


def greedy(model: Any, tokens: int) -> list[list[int]]:
    """Greedy tokens of a transformers model."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    outputs = [model.generate(torch.tensor([prompt]), **options)[0] for prompt in PROMPTS]
    return [ids[len(prompt) :].tolist() for ids, prompt in zip(outputs, PROMPTS, strict=True)]


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


def generated(model: Any, tokens: int) -> list[list[int]]:
    """Greedy tokens of an engine."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = model.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def serve(folder: Path, tokens: int, **options: Any) -> tuple[list[list[int]], dict[str, str]]:
    """Greedy tokens of vLLM, and how each layer runs (`methods_of`)."""
    with engine(folder, **options) as model:
        alone = "tensor_parallel_size" not in options
        return generated(model, tokens), model.apply_model(methods_of)[0] if alone else {}


def methods_of(model: torch.nn.Module) -> dict[str, str]:
    """How each linear layer, the experts and the head run: "packed", or the method's class."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    methods = {}
    for name, module in model.named_modules():
        experts = isinstance(module, RoutedExperts)
        if experts or isinstance(module, (LinearBase, ParallelLMHead)):
            packed = hasattr(module, "sparse_experts" if experts else "weight_packed")
            weight = getattr(module, "w2_weight" if experts else "weight", None)
            dense = weight is not None and weight.numel() > 0
            assert not (packed and dense), f"{name}: two copies"
            methods[name] = "packed" if packed else type(module.quant_method).__name__
    return methods
