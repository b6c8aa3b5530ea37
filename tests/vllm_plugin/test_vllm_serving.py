"""Tiny pruned models of each family served by vLLM: greedy tokens in float32 equal transformers' on the unpacked weights."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import (
    needs_vllm,
    reference,
    save_model,
    save_quantized,
    serve,
    served_log_probabilities,
)

needs_vllm()

from rac_modifier.checkpoint.load import load_model  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402

ROOT = Path(__file__).parents[2]
TOKENS = 12
SPARSE = "packed" if support().isa else "RacLinearMethod"
EXPERTS = "packed" if support().isa else "UnquantizedFusedMoEMethod"


@pytest.mark.parametrize(
    ("kind", "structure", "changes"),
    [
        ("qwen3", "2:4", {}),
        ("qwen3", "unstructured", {}),
        ("qwen2", "unstructured", {"tie_word_embeddings": False}),  # biases
        ("llama", "2:4", {"attention_bias": True, "num_key_value_heads": 4}),
        ("llama", "unstructured", {"intermediate_size": 100}),  # no multiple of 8
        ("qwen3_moe", "2:4", {}),
        ("qwen3_moe", "unstructured", {}),
        (
            "qwen3_moe",
            "unstructured",
            {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 48},
        ),
        ("mixtral", "2:4", {}),
    ],
)
@pytest.mark.slow
def test_greedy_tokens(tmp_path, kind, structure, changes):
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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_greedy_tokens_of_quantized_weights(tmp_path, structure, scheme):
    """Against transformers on the dequantized weights. Rounding could swap two close tokens; it does not here."""
    save_quantized(tmp_path / "model", tmp_path / "meant", structure, scheme)
    tokens, methods = serve(tmp_path / "model", TOKENS)
    assert methods["model.layers.0.self_attn.o_proj"] == "UnquantizedLinearMethod"  # ignored
    assert (
        methods["model.layers.0.mlp.down_proj"]
        == methods["model.layers.0.self_attn.qkv_proj"]
        == SPARSE
    )
    assert tokens == reference(tmp_path / "meant", TOKENS)


@pytest.mark.slow
def test_dense_stored_weights_on_request(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3", "unstructured", packed=False)
    expected = reference(folder, TOKENS)
    stock, methods = serve(folder, TOKENS)
    assert stock == expected
    assert set(methods.values()) == {
        "UnquantizedLinearMethod",
        "UnquantizedEmbeddingMethod",
    }  # layers, and their head
    tokens, methods = serve(folder, TOKENS, quantization="rac")
    assert tokens == expected
    assert methods["model.layers.0.mlp.down_proj"] == SPARSE
    assert methods["model.layers.0.self_attn.o_proj"] == "UnquantizedLinearMethod"


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_a_draft_runs_sparse_and_the_tokens_are_those_of_the_dense_model(
    tmp_path, monkeypatch, structure
):
    from vllm import SamplingParams

    from rac_modifier.vllm_plugin import load_report
    from tests.vllm_plugin.vllm_fixtures import PROMPTS, engine

    said: list[str] = []
    monkeypatch.setattr(
        load_report.logger, "info", lambda message, *arguments: said.append(message % arguments)
    )
    other = (
        "unstructured" if structure == "2:4" else "2:4"
    )  # the draft often errs: its weights have another mask
    target = save_model(tmp_path / "target", "qwen3", other, packed=False)
    draft = save_model(tmp_path / "draft", "qwen3", structure)
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with engine(target, speculative_config=speculative, disable_log_stats=False) as model:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
        outputs = model.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False
        )
        counts = {
            metric.name: metric.value for metric in model.get_metrics() if hasattr(metric, "value")
        }
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference(target, TOKENS)
    assert (
        0
        < counts["vllm:spec_decode_num_accepted_tokens"]
        < counts["vllm:spec_decode_num_draft_tokens"]
    )
    assert said[0].startswith(f"rac: {7 if support().isa else 0} of 7 compressed layers")


@pytest.mark.slow
def test_one_summary_at_load(tmp_path, monkeypatch):
    from rac_modifier.vllm_plugin import load_report

    said: list[str] = []
    # vLLM configures logging anew in each engine, which drops handlers.
    monkeypatch.setattr(
        load_report.logger, "info", lambda message, *arguments: said.append(message % arguments)
    )
    serve(save_model(tmp_path / "model", "qwen3", "2:4"), 1)
    assert len(said) == 1
    assert said[0].startswith(f"rac: {7 if support().isa else 0} of 7 compressed layers")


@pytest.mark.slow
def test_bfloat16_is_as_close_as_stock_vllm(tmp_path):
    """Teacher-forced log-probabilities in bfloat16, ours and those of vLLM's dense layers, against float32."""
    packed = save_model(tmp_path / "packed", "qwen3", "unstructured")
    dense = save_model(tmp_path / "dense", "qwen3", "unstructured", packed=False)
    sequences = torch.randint(2, 256, (16, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = load_model(packed, dtype="float32")(sequences).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    errors = [
        (served_log_probabilities(folder, sequences, dtype="bfloat16") - expected).abs().mean()
        for folder in (packed, dense)
    ]
    assert 0 < errors[0] <= 1.05 * errors[1], errors


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_greedy_tokens_of_quantized_experts(tmp_path, scheme):
    save_quantized(tmp_path / "model", tmp_path / "meant", "unstructured", scheme, kind="qwen3_moe")
    tokens, methods = serve(tmp_path / "model", TOKENS)
    assert [method for name, method in methods.items() if "experts" in name] == [EXPERTS] * 2
    assert tokens == reference(tmp_path / "meant", TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "structure"),
    [("qwen3", "2:4"), ("qwen3", "unstructured"), ("qwen3_moe", "unstructured")],
)
def test_compiled(tmp_path, kind, structure):
    folder = save_model(tmp_path / "model", kind, structure)
    tokens, _ = serve(folder, TOKENS, enforce_eager=False)
    assert tokens == reference(folder, TOKENS)


TWO_RANKS = """
import sys
from pathlib import Path
from tests.vllm_plugin.vllm_fixtures import needs_vllm, serve
if __name__ == "__main__":
    needs_vllm()
    tokens, _ = serve(Path(sys.argv[1]), int(sys.argv[2]), tensor_parallel_size=2)
    print("tokens:", tokens)
"""


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_two_ranks(tmp_path, structure):
    """Each worker is a process and loads the plugin by its entry point. 100 / 2 is not a multiple of 8."""
    folder = save_model(tmp_path / "model", "qwen3", structure, intermediate_size=100)
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    path = [str(entry_point(tmp_path / "path")), str(ROOT), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(TOKENS)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    found = [
        line.removeprefix("tokens: ")
        for line in done.stdout.splitlines()
        if line.startswith("tokens: ")
    ]
    assert found == [str(reference(folder, TOKENS))], done.stderr[-3000:]


def entry_point(folder: Path) -> Path:
    """A folder that, on the path, has the plugin's entry point as an installed rac-modifier has it."""
    info = folder / "rac_modifier_under_test-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rac-modifier-under-test\nVersion: 0\n"
    )
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nrac = rac_modifier.vllm_plugin.register:register\n"
    )
    return folder


@pytest.mark.slow
def test_vllm_serve_over_http(tmp_path):
    """The demo: `vllm serve` with the embedded reasoner, a third of its weights pruned, which costs little accuracy."""
    from safetensors.torch import load_file, save_file

    from rac_modifier.checkpoint.packing import pack_checkpoint
    from rac_modifier.reasoner import reasoner_path

    folder = tmp_path / "reasoner"
    shutil.copytree(reasoner_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in tensors if name.endswith("proj.weight")]
    for module in modules:
        magnitudes = tensors[f"{module}.weight"].abs().float()
        tensors[f"{module}.weight"][
            magnitudes <= magnitudes.flatten().kthvalue(magnitudes.numel() // 3).values
        ] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    pack_checkpoint(folder, dict.fromkeys(modules, "unstructured"), dense_linears=["lm_head"])

    path = os.pathsep.join([str(entry_point(tmp_path / "path")), str(ROOT)])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("VLLM_")
    } | {"PYTHONPATH": path}
    command = [
        sys.executable,
        str(ROOT / "examples/serve_demo.py"),
        str(folder),
        "--problems",
        "24",
    ]
    done = subprocess.run(
        [*command, "--log", str(tmp_path / "log"), "--enforce-eager"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    right = re.search(r"(\d+) of 24 held-out problems right", done.stdout)
    assert right, done.stdout
    assert int(right[1]) >= 18, done.stdout
    assert "rac: " in done.stdout
    port = re.search(r"127\.0\.0\.1:(\d+)", done.stdout)
    assert port
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port[1]))) != 0, "the server still runs"
