"""What a served token takes beside products: calls of Python and C functions, and processor time, of each process of vLLM.

    .venv-serve/bin/python benchmarks/served_token.py                                     # a model of four layers
    .venv-serve/bin/python benchmarks/served_token.py --layers 28 -- --stream-interval 8  # what is behind -- goes to vLLM
    .venv-serve/bin/python benchmarks/served_token.py -- --enforce-eager                  # ready sooner: nothing is compiled
    .venv-serve/bin/python benchmarks/served_token.py --alone [--compilation-config JSON] # one process, without a server
    .venv-serve/bin/python benchmarks/served_token.py --alone --narrow --layers 28 --vocab 151936 # and what is no product

One request at a time, greedy. Calls are counted by Python's own profiler in the main thread of each process, in a request that
is not timed. Those of a process that polls for its next step are in a column of their own; their number, and with it other
calls of that process, depends on what else the machine does. Processor time is the least of several requests; other work
makes it longer. Both are differences of a long and a short request, so that the prompt does not count. The server has one
thread for products, which so wait for no other one. --alone counts a step of vLLM's engine with model and sampler, in this
process, and times its parts. --narrow has layers of 256 columns, whose products take next to no time; the rest is that of other
models of as many layers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from random_model import save_model
from streaming_client import Load, measure
from vllm_server import Server, serving

from rac_modifier.settings.pattern import Pattern

SHORT, LONG = 8, 72  # tokens
STEPS = 10  # that are counted of an engine alone
LIMITS = {"max_model_len": 256, "max_num_batched_tokens": 128, "max_num_seqs": 4}
POLLING = "shm_broadcast.py"  # where a worker asks for its next step, over and over


def processes(server: Server) -> list[psutil.Process]:
    """Those of a server that serve, and not those of Python's own that clean up after them."""
    every = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    return [process for process in every if "resource_tracker" not in " ".join(process.cmdline())]


def spent(process: psutil.Process) -> float:
    """Milliseconds of processor time of all threads."""
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e6


def counted(server: Server, load: Load, folder: Path) -> dict[int, tuple[int, int, int]]:
    """Calls of Python functions, of C functions, and while polling, in one request of each process."""
    found = processes(server)
    for process in found:
        process.send_signal(signal.SIGUSR1)
    measure(server.url, load, 1, 1)
    for process in found:
        process.send_signal(signal.SIGUSR2)
    files = {process.pid: folder / f"{process.pid}.json" for process in found}
    deadline = time.monotonic() + 60
    while not all(
        file.is_file() for file in files.values()
    ):  # a waiting process runs its handler at the next message
        if time.monotonic() > deadline:
            raise SystemExit(
                f"{[pid for pid, file in files.items() if not file.is_file()]} counted nothing"
            )
        measure(server.url, Load(1, 2, load.vocab, load.model), 1, 1)
    calls = {pid: tuple(totals(json.loads(file.read_text()))) for pid, file in files.items()}
    for file in files.values():
        file.unlink()
    return calls


def totals(rows: list[tuple[str, str, str, int]]) -> Iterator[int]:
    for kind in ("py", "c"):
        yield sum(calls for of, file, _, calls in rows if of == kind and not file.endswith(POLLING))
    yield sum(calls for _, file, _, calls in rows if file.endswith(POLLING))


def alone(model: Path, compilation: dict[str, Any]) -> None:
    """Count and time steps of an engine in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
        "RAC_LM_HEAD": "int4",
    }
    from call_counts.sitecustomize import begin, end
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        gpu_memory_utilization=0.3,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        compilation_config=compilation,
        **LIMITS,
    )
    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=230, ignore_eos=True, detokenize=False)
    engine.add_request("0", {"prompt_token_ids": list(range(1, 17))}, sampling)
    for _ in range(SHORT):
        engine.step()
    with tempfile.TemporaryDirectory() as made:
        os.environ["RAC_COUNT_CALLS"] = made
        begin()
        for _ in range(STEPS):
            engine.step()
        end()
        python, c, _ = totals(json.loads(Path(made, f"{os.getpid()}.json").read_text()))
    times = []
    for _ in range(120):
        started = time.thread_time()
        engine.step()
        times.append(1e3 * (time.thread_time() - started))
    print("| Python functions | C functions | processor ms |\n|---|---|---|")
    print(f"| {python / STEPS:,.0f} | {c / STEPS:,.0f} | {min(times):.2f} |\n")
    print("| part | processor ms, median |\n|---|---|")
    for part, milliseconds in parts(engine).items():
        print(f"| {part} | {milliseconds:.2f} |", flush=True)


def parts(engine: Any) -> dict[str, float]:
    """Median milliseconds of processor time of the parts of 60 steps, and of whole steps."""
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    timed: dict[str, list[float]] = {}

    def time_calls(owner: Any, method: str, part: str) -> None:
        call, times = getattr(owner, method), timed.setdefault(part, [])

        def timing(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                times.append(1e3 * (time.thread_time() - started))

        object.__setattr__(owner, method, timing)

    time_calls(core.scheduler, "schedule", "scheduling")
    time_calls(runner, "_prepare_inputs", "inputs")
    time_calls(runner, "_build_attention_metadata", "attention metadata")
    time_calls(runner, "_model_forward", "layers")
    time_calls(runner.model, "compute_logits", "head")
    time_calls(runner, "_sample", "sampling")
    time_calls(runner, "_bookkeeping_sync", "tokens into the batch")
    time_calls(core.scheduler, "update_from_output", "tokens to requests")
    time_calls(engine.output_processor, "process_outputs", "outputs")
    time_calls(engine, "step", "the whole step")
    for _ in range(60):
        engine.step()
    return {part: statistics.median(times) for part, times in timed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=5, help="that are timed")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/served_token"), help="folder of the models"
    )
    parser.add_argument("--alone", action="store_true", help="no server: an engine in this process")
    parser.add_argument("--narrow", action="store_true", help="layers of 256 columns")
    parser.add_argument(
        "--compilation-config", type=json.loads, default={}, help="with --alone: vLLM's, as JSON"
    )
    parser.add_argument("options", nargs="*", help="of vllm serve, behind --")
    args = parser.parse_args()
    model = args.keep / f"{'narrow-' if args.narrow else ''}50-int4-{args.layers}-{args.vocab}"
    args.keep.mkdir(parents=True, exist_ok=True)
    save_model(
        model, args.layers, args.vocab, Pattern.unstructured(0.5), codes=4, narrow=args.narrow
    )
    if args.alone:
        alone(model, args.compilation_config)
        os._exit(0)  # at once: the engine has nothing to save
    short, long = (Load(16, tokens, args.vocab, "model") for tokens in (SHORT, LONG))
    options = [
        "--served-model-name",
        "model",
        "--skip-tokenizer-init",
        "--dtype",
        "bfloat16",
        *args.options,
    ]
    options += [
        word
        for name, value in LIMITS.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    with tempfile.TemporaryDirectory() as made:
        paths = [str(Path(__file__).parent / "call_counts"), os.environ.get("PYTHONPATH", "")]
        environment = {
            "RAC_COUNT_CALLS": made,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "RAC_LM_HEAD": "int4",
            "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0))),
        }
        with serving(model, options, model.with_suffix(".log"), environment=environment) as server:
            measure(server.url, short, 1, 1)
            found = processes(server)
            least = {process.pid: float("inf") for process in found}
            for _ in range(args.requests):
                before = [spent(process) for process in found]
                measure(server.url, short, 1, 1)
                between = [spent(process) for process in found]
                measure(server.url, long, 1, 1)
                for process, a, b in zip(found, before, between, strict=True):
                    least[process.pid] = min(least[process.pid], spent(process) - b - (b - a))
            few, many = (counted(server, load, Path(made)) for load in (short, long))
            print(
                "| process | Python functions | C functions | while polling | processor ms |\n|---|---|---|---|---|"
            )
            for process in found:
                calls = [
                    (b - a) / (LONG - SHORT)
                    for a, b in zip(few[process.pid], many[process.pid], strict=True)
                ]
                shown = " | ".join(f"{each:,.0f}" for each in calls)
                print(f"| {process.name()} | {shown} | {least[process.pid] / (LONG - SHORT):.2f} |")


if __name__ == "__main__":
    main()
