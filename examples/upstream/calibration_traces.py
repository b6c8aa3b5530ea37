# SPDX-License-Identifier: Apache-2.0
"""Calibration data from a model's own chains of thought (RAC, arXiv 2509.12464).

    from datasets import load_dataset
    problems = load_dataset("open-r1/OpenR1-Math-220k", split="train")["problem"]
    data = generate_calibration_traces(
        model, problems, tokens=262_144, row_tokens=2048, store="traces.jsonl")
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=2048,
            num_calibration_samples=len(data))

The dataset has the sampled token ids: text that is tokenized again loses the EOS, and chat
templates drop the thinking of a finished turn. It needs torch, transformers and datasets.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetInfo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Completes prompts, [tokens] each, with one seed each; a completion ends with its EOS.
Sampler = Callable[[Sequence[Sequence[int]], Sequence[int]], Sequence[Sequence[int]]]
_LONGEST_PERIOD, _COPIES, _LEAST_REPEATED = 128, 3, 64  # tokens, copies, tokens


@dataclass(frozen=True)
class SamplingOptions:
    """How the model is sampled; the store of other options is another store."""

    max_new_tokens: int = 4096
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95
    samples_per_problem: int = 1
    batch_size: int = 8
    seed: int = 0
    system_prompt: str | None = None
    template_options: tuple[tuple[str, Any], ...] = ()  # such as (("enable_thinking", True),)


@dataclass(frozen=True)
class Trace:
    """A prompt and its completion as token ids; a completion that ended has its EOS."""

    prompt: list[int]
    completion: list[int]
    finished: bool

    def without_repeated_tail(self) -> Trace:
        """Cut copies at the end of a truncated completion down to the first."""
        ids = self.completion
        longest = 0 if self.finished else min(_LONGEST_PERIOD, len(ids) // _COPIES)
        for period in range(1, longest + 1):
            same = 0
            while period + same < len(ids) and ids[-1 - same] == ids[-1 - same - period]:
                same += 1
            if same >= (_COPIES - 1) * period and same + period >= _LEAST_REPEATED:
                return Trace(self.prompt, ids[:-same], False)
        return self


def generate_calibration_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[str],
    *,
    tokens: int,
    options: SamplingOptions = SamplingOptions(),
    row_tokens: int | None = None,
    store: str | os.PathLike[str] | None = None,
    sampler: Sampler | None = None,
    filter_fn: Callable[[str, str], bool] | None = None,
) -> Dataset:
    """Sample chains of thought until they have `tokens` tokens, and return them as a dataset.

    Args:
        model: samples in this process, unless there is a `sampler`.
        problems: the questions, in the order in which they are asked.
        tokens: prompt and completion tokens without repeated tails; problems may give fewer.
        row_tokens: pack traces into rows of this length, so that no collator cuts or pads
            them; None: a row per trace.
        store: JSON Lines file of all traces, from which a killed call goes on.
        sampler: another way to sample, such as `server_sampler`.
        filter_fn: takes a problem and a completion as text; False leaves the trace out.

    Returns:
        Columns `input_ids` and `attention_mask`. `info.description` is JSON: model, options and
        counts.

    Raises:
        ValueError: no token is asked for or found, or a store of another model or other options.
    """
    if tokens < 1 or (row_tokens is not None and row_tokens < 1):
        raise ValueError(f"tokens={tokens}, row_tokens={row_tokens}: both must be at least 1")
    header = {
        "model": model.config.name_or_path,
        "weights": _fingerprint(model),
        "vocabulary": len(tokenizer),
        "options": asdict(options),
        "sampled_by": "transformers" if sampler is None else "sampler",
    }
    sampler = sampler or _in_process(model, tokenizer, options)
    eos = set(_eos_ids(model, tokenizer))
    traces: list[Trace] = []
    counts = {"tokens": 0, "sampled": 0, "finished": 0, "filtered": 0, "repeated_tokens": 0}
    for problem, trace in _Store(store, header).traces(problems, tokenizer, options, sampler, eos):
        shorter = trace.without_repeated_tail()
        counts["sampled"] += 1
        counts["finished"] += trace.finished
        counts["repeated_tokens"] += len(trace.completion) - len(shorter.completion)
        if filter_fn and not filter_fn(problem, tokenizer.decode(trace.completion)):
            counts["filtered"] += 1
            continue
        traces.append(shorter)
        counts["tokens"] += len(shorter.prompt) + len(shorter.completion)
        if counts["tokens"] >= tokens:
            break
    rows = [trace.prompt + trace.completion for trace in traces]
    if row_tokens is not None:
        joined = [i for row in rows for i in row]
        starts = range(0, len(joined) - row_tokens + 1, row_tokens)
        rows = [joined[i : i + row_tokens] for i in starts]
    if not rows:
        raise ValueError(f"{counts['tokens']} tokens of traces fill no row; give more problems")
    columns = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    description = json.dumps(header | counts | {"rows": len(rows)}, default=str)
    return Dataset.from_dict(columns, info=DatasetInfo(description=description))


class _Store:
    """A header, then a line per batch of traces; without a path, memory alone."""

    def __init__(self, path: str | os.PathLike[str] | None, header: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self._lines: list[dict[str, Any]] = []
        if self.path is None:
            return
        written = json.loads(json.dumps(header, default=str))
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed call may leave a part of a line
        lines = [json.loads(line) for line in whole.splitlines()]
        if lines and lines[0] != written:
            names = [name for name in written if lines[0].get(name) != written[name]]
            raise ValueError(f"{path} has traces of another {' and '.join(names)}; name another")
        self._lines = lines[1:]
        with self.path.open("r+b" if content else "wb") as file:
            file.truncate(len(whole))
        if not lines:
            self._append(written)

    def traces(
        self,
        problems: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        options: SamplingOptions,
        sampler: Sampler,
        eos: set[int],
    ) -> Iterator[tuple[str, Trace]]:
        """Yield stored traces, then new ones, in the order of the problems."""
        asked = ((p, n) for p in problems for n in range(options.samples_per_problem))
        number = 0
        while batch := list(islice(asked, options.batch_size)):
            digest = hashlib.sha256(json.dumps(batch).encode()).hexdigest()
            if number < len(self._lines):
                line = self._lines[number]
                if line["problems"] != digest:
                    raise ValueError(f"{self.path} has traces of other problems; name another")
            else:
                prompts = [_prompt(tokenizer, problem, options) for problem, _ in batch]
                seeds = [_seed(options.seed, problem, n) for problem, n in batch]
                traces = []
                for prompt, ids in zip(prompts, sampler(prompts, seeds), strict=True):
                    completion = list(map(int, ids))
                    traces.append(asdict(Trace(prompt, completion, completion[-1] in eos)))
                line = {"problems": digest, "traces": traces}
                self._append(line)
            for (problem, _), fields in zip(batch, line["traces"], strict=True):
                yield problem, Trace(**fields)
            number += 1

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


def server_sampler(
    url: str, model: str, options: SamplingOptions, timeout: float = 3600
) -> Sampler:
    """Sample with `vllm serve` at `url` (it ends in /v1), which runs in its own environment."""

    def complete(prompt: Sequence[int], seed: int) -> list[int]:
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": seed,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            ids = json.load(reply)["choices"][0].get("token_ids")
        if not ids:
            raise ValueError(f"{url} returned no token ids; it must know return_token_ids")
        return ids

    def sample(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        return list(ThreadPoolExecutor(len(prompts)).map(complete, prompts, seeds))

    return sample


def _in_process(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: SamplingOptions
) -> Sampler:
    """Sample with `model.generate`, padded on the left."""
    eos = _eos_ids(model, tokenizer)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        how |= {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}

    @torch.no_grad()
    def sample(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[eos[0]] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=options.max_new_tokens,
                eos_token_id=eos,
                pad_token_id=eos[0],
                **how,
            )
        rows = output[:, width:].tolist()
        ends = [next((i + 1 for i, token in enumerate(r) if token in eos), None) for r in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    return sample


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    ids = list(dict.fromkeys(i for i in ids if i is not None))
    if not ids:
        raise ValueError("the model has no EOS token; set generation_config.eos_token_id")
    return ids


def _prompt(
    tokenizer: PreTrainedTokenizerBase, problem: str, options: SamplingOptions
) -> list[int]:
    if tokenizer.chat_template is None:
        ids = tokenizer(problem)["input_ids"]
    else:
        system = [{"role": "system", "content": options.system_prompt}]
        messages = [
            *(system if options.system_prompt else []),
            {"role": "user", "content": problem},
        ]
        ids = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            return_dict=False,
            **dict(options.template_options),
        )
    return list(map(int, ids))


def _seed(seed: int, problem: str, sample: int) -> int:
    digest = hashlib.sha256(json.dumps([seed, problem, sample]).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def _fingerprint(model: PreTrainedModel) -> str:
    """Hash a few elements of each parameter: pruned or trained weights are another model."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        few = weight.detach().reshape(-1)[:: weight.numel() // 64 | 1].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode() + few.float().numpy().tobytes())
    return digest.hexdigest()[:16]
