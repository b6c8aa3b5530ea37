"""Tiny models of each stored form served by vLLM."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.stored_forms import int4, quantization, stored_words, words_config
from tests.vllm_plugin.vllm_fixtures import (
    engine,
    generated,
    greedy,
    needs_vllm,
    reference,
    rewrite,
    save_codes,
    save_model,
    save_quantized,
    serve,
)

needs_vllm()

from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.packing import mark_dense
from rac_modifier.kernels.cpu.support import support

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
TOKENS = 12
KERNELS = support().isa is not None
SPARSE = "packed" if KERNELS else "RacLinearMethod"
EXPERTS = "packed" if KERNELS else "UnquantizedFusedMoEMethod"
SUMMARY = f"rac: {7 if KERNELS else 0} of 7 compressed layers run on a kernel\n"
needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)


def summary(said: list[str]) -> str:
    """The report of the layers, which is logged once."""
    (text,) = [text for text in said if "compressed layers" in text]
    return text


@pytest.mark.parametrize(
    ("kind", "structure", "changes"),
    [
        ("qwen3", "2:4", {}),
        ("qwen2", "unstructured", {"tie_word_embeddings": False}),  # biases
        ("llama", "unstructured", {"intermediate_size": 100}),  # no multiple of 8
        ("qwen3_moe", "unstructured",
         {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 48}),
        ("mixtral", "2:4", {}),
    ],
)  # fmt: skip
def test_greedy_tokens(tmp_path, said, kind, structure, changes):
    folder = save_model(tmp_path / "model", kind, structure, **changes)
    tokens, methods = serve(folder, TOKENS)
    assert tokens == reference(folder, TOKENS)
    prefix = "model.layers.0"
    assert methods[f"{prefix}.self_attn.o_proj"] == "UnquantizedLinearMethod"  # ignored
    assert methods[f"{prefix}.self_attn.qkv_proj"] == SPARSE
    if kind in ("qwen3_moe", "mixtral"):
        assert [method for name, method in methods.items() if "experts" in name] == [EXPERTS] * 2
    else:
        assert methods[f"{prefix}.mlp.gate_up_proj"] == methods[f"{prefix}.mlp.down_proj"] == SPARSE
        assert summary(said).startswith(SUMMARY)


@pytest.mark.parametrize(
    ("kind", "structure", "scheme"),
    [
        ("qwen3", "2:4", "int8"),
        ("qwen3", "unstructured", "int4"),
        ("qwen3", "2:4", "fp8"),
        ("qwen3_moe", "unstructured", "int4"),
    ],
)
def test_greedy_tokens_of_quantized_weights(tmp_path, kind, structure, scheme):
    """Rounding could swap two close tokens; it does not here."""
    save_quantized(tmp_path / "model", tmp_path / "meant", structure, scheme, kind)
    tokens, methods = serve(tmp_path / "model", TOKENS)
    assert methods["model.layers.0.self_attn.qkv_proj"] == SPARSE
    if kind == "qwen3_moe":
        assert [method for name, method in methods.items() if "experts" in name] == [EXPERTS] * 2
    assert tokens == reference(tmp_path / "meant", TOKENS)


def test_a_draft_runs_sparse_and_the_tokens_are_those_of_the_dense_model(tmp_path, said):
    # the draft often errs: its weights have another mask
    target = save_model(tmp_path / "target", "qwen3", "2:4", packed=False)
    draft = save_model(tmp_path / "draft", "qwen3", "unstructured")
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with engine(target, speculative_config=speculative, disable_log_stats=False) as model:
        tokens = generated(model, TOKENS)
        counts = {m.name: m.value for m in model.get_metrics() if hasattr(m, "value")}
    assert tokens == reference(target, TOKENS)
    accepted = counts["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counts["vllm:spec_decode_num_draft_tokens"]
    assert summary(said).startswith(SUMMARY)


@pytest.mark.parametrize(("kind", "structure"), [("qwen3", "2:4"), ("qwen3_moe", "unstructured")])
def test_compiled(tmp_path, kind, structure):
    folder = save_model(tmp_path / "model", kind, structure)
    tokens, _ = serve(folder, TOKENS, enforce_eager=False)
    assert tokens == reference(folder, TOKENS)


# ---- dense weights of few bits


@needs_kernel
@pytest.mark.parametrize(
    ("form", "group", "symmetric", "reorder"),
    [("gptq", 32, False, False), ("gptq_v2", 32, True, True), ("awq", 128, False, False),
     ("compressed-tensors", 32, False, False)],
)  # fmt: skip
def test_greedy_tokens_of_codes(tmp_path, said, form, group, symmetric, reorder):
    orders: dict[int, torch.Tensor] = {}

    def store(weight):
        if form == "compressed-tensors":
            return int4(weight, group, symmetric)
        columns = weight.shape[1]
        order = orders.setdefault(columns, torch.randperm(columns)) if reorder else None
        return stored_words(weight, group, symmetric, 4, form, order)

    entry = quantization(group, symmetric)
    if form != "compressed-tensors":
        entry = words_config(form, group, symmetric, **({"desc_act": True} if reorder else {}))
    sizes = {"hidden_size": 128, "intermediate_size": 256} if group == 128 else {}
    save_codes(tmp_path / "model", tmp_path / "meant", entry, store, **sizes)
    option = {"quantization": "rac"}
    if form == "compressed-tensors":  # as this package saves it
        mark_dense(tmp_path / "model", {})
        option = {}
    tokens, methods = serve(tmp_path / "model", TOKENS, **option)
    assert tokens == reference(tmp_path / "meant", TOKENS)
    in_floats = "UnquantizedLinearMethod" if "ignore" in entry else "RacLinearMethod"
    assert methods["model.layers.0.self_attn.o_proj"] == in_floats
    assert methods["model.layers.1.self_attn.o_proj"] == "packed"
    assert summary(said).startswith(SUMMARY)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_dense_experts_of_int4(tmp_path, said, form):
    folder, meant, option = tmp_path / "model", tmp_path / "meant", {"quantization": "rac"}
    if form == "gptq":
        store = partial(stored_words, group=32, symmetric=True)
        save_codes(folder, meant, words_config("gptq", 32, True), store, "qwen3_moe")
    else:
        save_codes(folder, meant, quantization(), int4, "qwen3_moe")
        mark_dense(folder, {})
        option = {}
    tokens, methods = serve(folder, TOKENS, **option)
    assert tokens == reference(meant, TOKENS)
    assert [method for name, method in methods.items() if "experts" in name] == [EXPERTS] * 2
    assert "experts: 2" in summary(said) or not KERNELS


def test_a_stored_embedding_and_head(tmp_path):
    """The embedding in int4 and an untied head in int8, in a packed sparse checkpoint."""
    from tests.vllm_plugin.test_vocabulary import scheme_of, stored

    folder = save_model(tmp_path / "model", "qwen3", "unstructured", tie_word_embeddings=False)
    model = load_model(folder, dtype="float32")
    schemes = {"model.embed_tokens": "int4", "lm_head": "int8"}
    for name, scheme in schemes.items():
        parts, meant = stored(model.get_submodule(name).weight.data.float(), scheme)
        rewrite(folder, None, [name], lambda _, parts=parts: (parts, _))
        model.get_submodule(name).weight.data = meant
    config = json.loads((folder / "config.json").read_text())
    groups = {name: {**scheme_of(scheme), "targets": [name]} for name, scheme in schemes.items()}
    config["quantization_config"] |= {
        "config_groups": groups,
        "quantization_status": "compressed",
        "format": "mixed-precision",
    }
    config["quantization_config"].setdefault("ignore", [])
    (folder / "config.json").write_text(json.dumps(config))
    tokens, methods = serve(folder, TOKENS)
    assert methods["lm_head"] == ("packed" if KERNELS else "VocabularyMethod")
    assert methods["model.layers.0.mlp.down_proj"] == SPARSE
    assert tokens == greedy(model, TOKENS)


# ---- other processes

TWO_RANKS = """
import sys
from pathlib import Path
from tests.vllm_plugin.vllm_fixtures import needs_vllm, serve
if __name__ == "__main__":
    needs_vllm()
    quantization = sys.argv[3] or None
    folder, length = Path(sys.argv[1]), int(sys.argv[2])
    tokens, _ = serve(folder, length, quantization=quantization, tensor_parallel_size=2)
    print("tokens:", tokens)
"""


@pytest.mark.parametrize("form", ["packed", "gptq"])
def test_two_ranks(tmp_path, form):
    """Each worker is a process and loads the plugin by its entry point."""
    folder = meant = tmp_path / "model"
    if form == "packed":
        save_model(folder, "qwen3", "unstructured", intermediate_size=100)
    else:
        meant = tmp_path / "meant"
        store = partial(stored_words, group=32, symmetric=False)
        save_codes(folder, meant, words_config("gptq", 32, False), store)
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    command = [sys.executable, str(tmp_path / "two_ranks.py"), str(folder), str(TOKENS)]
    process = subprocess.run(
        [*command, "" if form == "packed" else "rac"],
        env={**os.environ, "PYTHONPATH": search_path(tmp_path)},
        capture_output=True,
        text=True,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("tokens: ")]
    assert lines == [f"tokens: {reference(meant, TOKENS)}"], process.stderr[-3000:]


def search_path(folder: Path) -> str:
    """A PYTHONPATH with the plugin's entry point, as an installed rac-modifier has it."""
    info = folder / "path" / "rac_modifier_under_test-0.dist-info"
    info.mkdir(parents=True)
    head = "Metadata-Version: 2.1\nName: rac-modifier-under-test\nVersion: 0\n"
    (info / "METADATA").write_text(head)
    point = "[vllm.general_plugins]\nrac = rac_modifier.vllm_plugin.register:register\n"
    (info / "entry_points.txt").write_text(point)
    return os.pathsep.join([str(folder / "path"), str(ROOT), str(Path(__file__).parent)])


def test_vllm_serve_over_http(tmp_path):
    """The demo: `vllm serve` with the embedded reasoner, a third of its weights pruned."""
    from safetensors.torch import load_file

    from rac_modifier.checkpoint.packing import pack_checkpoint
    from rac_modifier.reasoner import reasoner_path

    folder = tmp_path / "reasoner"
    shutil.copytree(reasoner_path(), folder)
    names = [n for n in load_file(folder / "model.safetensors") if n.endswith("proj.weight")]
    modules = [name.removesuffix(".weight") for name in names]

    def prune_a_third(weight):
        sizes = weight.abs().float()
        least = sizes.flatten().kthvalue(sizes.numel() // 3).values
        return {"weight": weight.masked_fill(sizes <= least, 0)}, weight

    rewrite(folder, None, modules, prune_a_third)
    (folder / "model.safetensors.index.json").unlink()
    pack_checkpoint(folder, dict.fromkeys(modules, "unstructured"), dense_linears=["lm_head"])
    environment = {name: v for name, v in os.environ.items() if not name.startswith("VLLM_")}
    command = [sys.executable, str(ROOT / "examples/serve_demo.py"), str(folder)]
    command += ["--problems", "24", "--log", str(tmp_path / "log"), "--enforce-eager"]
    process = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": search_path(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    right = re.search(r"(\d+) of 24 held-out problems right", process.stdout)
    assert right, process.stdout
    assert int(right[1]) >= 18, process.stdout
    assert "rac: " in process.stdout
    port = re.search(r"127\.0\.0\.1:(\d+)", process.stdout)
    assert port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port[1]))) != 0, "the server still runs"
