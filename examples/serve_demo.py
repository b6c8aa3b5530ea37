"""Serve a pruned checkpoint with `vllm serve` and ask it problems over HTTP, as any client would.

    make serve-demo      (or, in the serving environment: python examples/serve_demo.py CHECKPOINT)

Starts the server on the loopback interface, waits until it is ready, asks held-out problems
through the `openai` client, several at a time, checks the answers, and always stops the
server at the end. vLLM loads the plugin by its entry point.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from openai import OpenAI

from rac_modifier.problems.answers import is_correct
from rac_modifier.problems.arithmetic import Solved, generate_distinct
from rac_modifier.sampling.own_server import VllmCommand, on_few_cores

NAME = "pruned"
EPILOG = "Other options, such as --enforce-eager, are passed to vllm serve."


def ask(client: OpenAI, problem: Solved, max_tokens: int) -> tuple[bool, int]:
    """Whether the answer is right, and how many tokens it took."""
    reply = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": problem.question}],
        temperature=0,
        max_tokens=max_tokens,
    )
    text = reply.choices[0].message.content or ""
    # The answers are integers, so equal text is enough.
    return is_correct(
        text, problem.answer, lambda a, b: a == b
    ), reply.usage.completion_tokens if reply.usage else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--problems", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the server; bfloat16 is slow on a CPU without bf16 units",
    )
    parser.add_argument("--log", type=Path, help="the server's log; default: beside the checkpoint")
    args, serve_options = parser.parse_known_args()
    options = ("--served-model-name", NAME, "--max-model-len", "1024")
    options += ("--gpu-memory-utilization", "0.3", *serve_options)
    vllm = VllmCommand(str(Path(sys.executable).with_name("vllm")), options, timeout=600)
    variables = {**on_few_cores(), "OMP_WAIT_POLICY": "PASSIVE"}  # threads sleep while they wait
    log = args.log or args.checkpoint.absolute().with_name(f"{args.checkpoint.absolute().name}.log")
    problems = list(islice(generate_distinct(0, "test"), args.problems))

    started = time.monotonic()
    with vllm.serve(str(args.checkpoint), args.dtype, log=log, variables=variables) as url:
        print(
            f"vllm serve {args.checkpoint}: ready after {time.monotonic() - started:.0f} s at {url}"
        )
        for line in log.read_text(errors="replace").splitlines():
            if any(
                mark in line for mark in ("rac:", "sparse kernel", "int8 kernel", "dense because")
            ):
                print("  " + line.partition("] ")[2])
        client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600)
        started = time.monotonic()
        with ThreadPoolExecutor(args.concurrency) as pool:
            answers = list(
                pool.map(lambda problem: ask(client, problem, args.max_tokens), problems)
            )
        seconds = time.monotonic() - started
    right, tokens = sum(ok for ok, _ in answers), sum(count for _, count in answers)
    print(f"{right} of {len(problems)} held-out problems right ({right / len(problems):.1%})")
    print(
        f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s at "
        f"{args.concurrency} requests at a time"
    )


if __name__ == "__main__":
    main()
