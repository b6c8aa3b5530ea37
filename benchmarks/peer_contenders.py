"""The contenders of peers.py: their names, and how each is run in this process."""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from kernel import SHAPES, read_speed
from torch import Tensor

from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_dense, pack_scale, pack_values

LLAMA = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q4_K_M": "Q4_K_M", "llama.cpp Q8_0": "Q8_0"}
# bits of the layers, share that is pruned, bits of the head
LINEARS = {
    "linears, 50 % + int4, head int4": (4, 0.5, 4),
    "linears, 50 % + int4, head int8": (4, 0.5, 8),
    "linears, 60 % + int4, head int4": (4, 0.6, 4),
    "linears, 70 % + int4, head int4": (4, 0.7, 4),
    "linears, 50 % + int8, head int8": (8, 0.5, 8),
    "linears, dense int4, head int4": (4, 0.0, 4),
    "linears, dense int3, head int4": (3, 0.0, 4),
}
OPENVINO = {  # bits of the layers and of the head; dense
    "OpenVINO linears, int4, head int4": (4, 4),
    "OpenVINO linears, int8, head int8": (8, 8),
}
TORCHAO = {"torchao linears, int4, head int4": (4, 4)}  # the same
SERVED = {  # the same as of LINEARS; 16 bits are bfloat16
    "served, 50 % + int4, head int4": (4, 0.5, 4),
    "served, 50 % + int4, head int8": (4, 0.5, 8),
    "served, 60 % + int4, head int4": (4, 0.6, 4),
    "served, 70 % + int4, head int4": (4, 0.7, 4),
    "served, 50 % + int8, head int8": (8, 0.5, 8),
    "served, dense int4, ours, head int4": (
        4,
        0.0,
        4,
    ),  # an ordinary W4A16 checkpoint, with --quantization rac
    "served, dense int3, ours, head int4": (
        3,
        0.0,
        4,
    ),  # the same with 3 bits, as rac_w3a16 saves it
    "vLLM, dense bfloat16": (16, 0.0, 16),  # vLLM's own products from here on
    "vLLM, dense int8 (W8A8)": (8, 0.0, 16),
    "vLLM, dense int4 (W4A16)": (4, 0.0, 16),
}
ONE_PROCESS = ", one process"  # vLLM's engine and worker in one, so that none polls for the other, without statistics
IN_CPP = f"{ONE_PROCESS}, step in C++"  # and the compiled step calls its pieces from C++
IN_PYTHON = {  # the same models in this process, by vLLM's `LLM`: no server and no client, as llama.cpp is timed
    name.replace("served", "in Python"): kind
    for name, kind in SERVED.items()
    if name.startswith("served")
}
SERVED |= {
    name + how: kind
    for name, kind in SERVED.items()
    if name.startswith("served")
    for how in (ONE_PROCESS, IN_CPP)
}
GROUP, HIDDEN = 128, 1536  # columns that share a scale of int4; columns of the head
GROUPS = {4: GROUP, 3: 64}  # by bits, as in the recipes


@dataclass(frozen=True)
class Figures:
    """One run of a contender. Seconds to the first token: None where no prompt is read."""

    weight_bytes: int
    ms_per_token: float
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    gigabytes_per_s: float | None = None  # of the read probe in the same process


def random_packed(
    rows: int, columns: int, bits: int, pruned: float, copies: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Copies of a packed weight of random integers with its scales: one per row of int8, one per 128 columns of int4, 64 of int3.

    Each is packed, as served weights are: packing asks the system for huge pages, and a plain copy would not have them.
    """
    return packed_integers(rows, columns, bits, pruned, copies, GROUPS.get(bits, columns))


def packed_integers(
    rows: int, columns: int, bits: int, pruned: float, copies: int = 1, group: int = GROUP
) -> list[tuple[Tensor, Tensor]]:
    """The same, with a scale per row and `group` columns."""
    most = min((1 << (bits - 1)) - 1, 7)
    values = torch.randint(-most, most + 1, (rows, columns), dtype=torch.int8)
    values = torch.where(values == 0, 1, values)
    scale = (torch.rand(rows, columns // group) + 0.5).bfloat16().float() / columns
    scales = pack_scale(scale, narrow=bits < 8)
    if not pruned:
        return [(pack_dense(values, bits), scales.clone()) for _ in range(copies)]
    mask = torch.rand(rows, columns) >= pruned
    bitmask = (mask.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(
        -1, dtype=torch.uint8
    )
    kept = values[mask]
    return [(pack_values(kept, bitmask, columns, bits), scales.clone()) for _ in range(copies)]


def linears(name: str, args: argparse.Namespace) -> Figures:
    """The products of a decode step: every layer has memory of its own, so that no cache helps."""
    bits, pruned, head_bits = LINEARS[name]
    torch.manual_seed(0)
    kinds = [(random_packed(n, k, bits, pruned, args.layers), n, k) for n, k in SHAPES["1.5B"]]
    weights = [(*copies[layer], n, k) for layer in range(args.layers) for copies, n, k in kinds]
    weights.append((*random_packed(args.vocab, HIDDEN, head_bits, 0.0)[0], args.vocab, HIDDEN))
    inputs = {k: torch.randn(1, k).bfloat16() for _, _, _, k in weights}
    nbytes = sum(data.nbytes + scale.nbytes for data, scale, _, _ in weights)
    times = []
    with torch.inference_mode():
        for _ in range(args.output_tokens):
            started = time.perf_counter()
            for data, scale, n, k in weights:
                sparse_linear(inputs[k], data, n, k, None, scale)
            times.append(time.perf_counter() - started)
    return Figures(nbytes, 1e3 * statistics.median(times[2:]), gigabytes_per_s=read_speed(3) / 1e9)


def openvino_linears(name: str, args: argparse.Namespace) -> Figures:
    """The same products in OpenVINO; every layer has memory of its own there, too."""
    from openvino_linears import decode_step

    bits, head_bits = OPENVINO[name]
    shapes = [(n, k, bits) for _ in range(args.layers) for n, k in SHAPES["1.5B"]]
    shapes.append((args.vocab, HIDDEN, head_bits))
    nbytes, milliseconds = decode_step(shapes, GROUP, args.threads, args.output_tokens)
    return Figures(nbytes, milliseconds, gigabytes_per_s=read_speed(3) / 1e9)


def torchao_linears(name: str, args: argparse.Namespace) -> Figures:
    """The same products by torchao's int4 weights."""
    from torchao_linears import decode_step

    shapes = [(n, k) for _ in range(args.layers) for n, k in SHAPES["1.5B"]]
    nbytes, milliseconds = decode_step([*shapes, (args.vocab, HIDDEN)], GROUP, args.output_tokens)
    return Figures(nbytes, milliseconds, gigabytes_per_s=read_speed(3) / 1e9)


def llama(name: str, args: argparse.Namespace) -> Figures:
    """Generate with llama.cpp; its own timings."""
    import xllamacpp
    from gguf_model import write_gguf

    path = args.keep / f"{LLAMA[name]}-{args.layers}-{args.vocab}.gguf"
    write_gguf(path, LLAMA[name], args.layers, args.vocab)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = (
        args.prompt_tokens + args.output_tokens + 64,
        1,
        0,
    )
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    draw = random.Random(0)
    firsts, each, totals = [], [], []
    for _ in range(3):  # the first one warms up
        prompt = [draw.randrange(args.vocab - 1) for _ in range(args.prompt_tokens)]
        body = {
            "prompt": prompt,
            "n_predict": args.output_tokens,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server.handle_completions({**body, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        timings = answer["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (
            args.prompt_tokens,
            args.output_tokens,
        ):
            raise SystemExit(
                f"{name}: asked for {args.output_tokens} tokens, and it counts {timings}"
            )
        firsts.append(timings["prompt_ms"] / 1e3)
        each.append(
            timings["predicted_ms"] / (args.output_tokens - 1)
        )  # its clock starts at the first token
        totals.append(args.output_tokens / (timings["prompt_ms"] + timings["predicted_ms"]) * 1e3)
    nbytes = path.stat().st_size  # names and norms are below 1 % of it
    return Figures(
        nbytes,
        statistics.median(each[1:]),
        statistics.median(firsts[1:]),
        statistics.median(totals[1:]),
    )


def served(name: str, args: argparse.Namespace) -> Figures:
    """Generate with `vllm serve` on our kernels; timed at the client."""
    from streaming_client import Load, measure
    from vllm_server import serving

    bits, pruned, head_bits = SERVED[name]
    ours = head_bits < 16
    folder = saved(bits, pruned, args)
    options = [
        "--served-model-name",
        "model",
        "--skip-tokenizer-init",
        "--max-model-len",
        "2048",
        "--dtype",
        "bfloat16",
        *(["--quantization", "rac"] if ours and not pruned else []),
    ]
    environment = {"RAC_LM_HEAD": f"int{head_bits}"} if ours else {}
    if ONE_PROCESS in name:
        options += ["--distributed-executor-backend", "uni", "--disable-log-stats"]
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if name.endswith(IN_CPP):
        options += [
            "--compilation-config",
            json.dumps({"inductor_compile_config": {"cpp_wrapper": True}}),
        ]
        environment["VLLM_USE_LAYERNAME"] = "0"
    log = folder.with_suffix(".log")
    with serving(folder, options, log, environment=environment) as server:
        load = Load(args.prompt_tokens, args.output_tokens, args.vocab, "model")
        measure(server.url, load, 1, 1)
        speed = measure(server.url, load, 1, 2)
    if ours and not pruned and "has no effect on this model" in log.read_text():
        raise SystemExit(f"{name}: vLLM's own method ran it; {log} has the reason")
    nbytes = bytes_read(bits, pruned, head_bits, args)
    return Figures(nbytes, speed.each_token_ms, speed.first_token_ms / 1e3, speed.tokens_per_second)


def in_python(name: str, args: argparse.Namespace) -> Figures:
    """Generate with vLLM's `LLM` in this process; the engine is stepped as `LLM.generate` does, and each step is timed."""
    bits, pruned, head_bits = IN_PYTHON[name]
    folder = saved(bits, pruned, args)
    os.environ |= {
        "RAC_LM_HEAD": f"int{head_bits}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **({} if pruned else {"quantization": "rac"}),
    ).llm_engine
    if unused := [text for text in said if "has no effect on this model" in text]:
        raise SystemExit(f"{name}: vLLM's own method ran it: {unused[0]}")
    sampling = SamplingParams(
        temperature=0, max_tokens=args.output_tokens, ignore_eos=True, detokenize=False
    )
    draw = random.Random(0)
    firsts, each, totals = [], [], []
    for turn in range(3):  # the first one warms up
        prompt = [draw.randrange(args.vocab - 1) for _ in range(args.prompt_tokens)]
        started = time.perf_counter()
        engine.add_request(str(turn), {"prompt_token_ids": prompt}, sampling)
        moments = []
        while engine.has_unfinished_requests():
            outputs = engine.step()
            moments += [time.perf_counter() - started] * len(outputs)
        if len(moments) != args.output_tokens:
            raise SystemExit(
                f"{name}: asked for {args.output_tokens} tokens, and {len(moments)} came"
            )
        firsts.append(moments[0])
        each.append(1e3 * (moments[-1] - moments[0]) / (args.output_tokens - 1))
        totals.append(args.output_tokens / moments[-1])
    nbytes = bytes_read(bits, pruned, head_bits, args)
    return Figures(
        nbytes,
        statistics.median(each[1:]),
        statistics.median(firsts[1:]),
        statistics.median(totals[1:]),
    )


def saved(bits: int, pruned: float, args: argparse.Namespace) -> Path:
    """The folder of a checkpoint with random weights; made where it is not there yet."""
    from random_model import save_model

    from rac_modifier.settings.pattern import Pattern

    folder: Path = (
        args.keep
        / f"{f'{100 * pruned:.0f}-' if pruned else 'dense-'}int{bits}-{args.layers}-{args.vocab}"
    )
    pattern = Pattern.unstructured(pruned) if pruned else None
    save_model(
        folder,
        args.layers,
        args.vocab,
        pattern,
        int8=bits == 8,
        codes=bits if bits in GROUPS else None,
    )
    return folder


def bytes_read(bits: int, pruned: float, head_bits: int, args: argparse.Namespace) -> int:
    """Bytes of the values, masks and scales that a token reads, of all layers and the head."""
    each = (
        (1 - pruned) * bits / 8
        + (1 / 8 if pruned else 0)
        + (2 / GROUPS[bits] if bits in GROUPS else 0)
    )
    head = 0.5 + 2 / GROUP if head_bits == 4 else head_bits / 8
    weights = args.layers * sum(n * k for n, k in SHAPES["1.5B"])
    return int(each * weights + head * args.vocab * HIDDEN)


def not_installed(name: str) -> str | None:
    """The reason if a package that a contender needs is not installed in this environment."""
    needs: list[tuple[Mapping[str, object], tuple[str, ...]]] = [
        (LLAMA, ("xllamacpp", "gguf")),
        (OPENVINO, ("openvino",)),
        (TORCHAO, ("torchao",)),
        ({**SERVED, **IN_PYTHON}, ("vllm",)),
    ]
    missing = [
        package
        for names, some in needs
        if name in names
        for package in some
        if not find_spec(package)
    ]
    return f"not installed: {' and '.join(missing)}" if missing else None


def one(name: str, args: argparse.Namespace) -> Figures:
    """Run a contender in this process."""
    torch.set_num_threads(args.threads)
    kinds = {linears: LINEARS, openvino_linears: OPENVINO, torchao_linears: TORCHAO, llama: LLAMA}
    kinds |= {served: SERVED, in_python: IN_PYTHON}
    return next(kind for kind, names in kinds.items() if name in names)(name, args)
