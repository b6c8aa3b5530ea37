"""The training of the embedded reasoner: optimizer, state of a run, one step, export."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from reasoner_data import IGNORED, VOCABULARY, batches, train_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


class Muon:
    """Muon (momentum, then the nearest orthogonal matrix by Newton-Schulz), in float32.

    torch.optim.Muon iterates in bfloat16, which takes longer than the whole step on a CPU
    without bf16 units; here matrices of one shape are iterated together in float32. An
    update is as large as AdamW's: 0.2 sqrt(max(shape)).
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ):
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in parameters]
        self.groups: dict[torch.Size, list[int]] = {}
        for index, p in enumerate(parameters):
            self.groups.setdefault(p.shape, []).append(index)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for indices in self.groups.values():
            updates = []
            for i in indices:
                grad = self.parameters[i].grad
                self.buffers[i].lerp_(grad, 1 - self.momentum)
                updates.append(grad.lerp(self.buffers[i], self.momentum))
            for i, update in zip(indices, self._orthogonal(torch.stack(updates)), strict=True):
                p = self.parameters[i]
                p.mul_(1 - lr * self.weight_decay).add_(
                    update, alpha=-lr * 0.2 * max(p.shape) ** 0.5
                )

    @staticmethod
    def _orthogonal(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if tall else x


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 50 steps, constant, then linear to zero over the last two fifths."""
    return peak * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


class Run:
    """The state of a training run and its one step."""

    def __init__(self, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast):
        self.args, self.tokenizer = args, tokenizer
        self.model = build_model(tokenizer, args.seed)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [
            p for n, p in self.model.named_parameters() if not (p.ndim == 2 and "embed" not in n)
        ]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
        self.rest, self.step = rest, 0
        if args.compile:
            for layer in self.model.model.layers:
                layer.compile(dynamic=True)

    def train_step(self, ids: torch.Tensor) -> float:
        lr = learning_rate(self.step, self.args.steps, self.args.lr)
        hidden = self.model.model(input_ids=ids.clamp_min(0), use_cache=False).last_hidden_state
        loss = F.cross_entropy(
            self.model.lm_head(hidden[:, :-1]).flatten(0, 1),
            ids[:, 1:].flatten(),
            ignore_index=IGNORED,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.muon.step(lr)
        self.adam.step()
        self.model.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.named_parameters()}
        tensors |= {f"muon.{i}": b for i, b in enumerate(self.muon.buffers)}
        for i, p in enumerate(self.rest):
            tensors |= {f"adam.{i}.{k}": v.contiguous() for k, v in self.adam.state[p].items()}
        partial = path.with_suffix(".partial")
        save_file(
            tensors, partial, metadata={"step": str(self.step), "settings": settings_key(self.args)}
        )
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["settings"] != settings_key(self.args):
            raise SystemExit(
                f"{path} belongs to a run with other settings; remove it or name another --work "
                "folder"
            )
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        for i, buffer in enumerate(self.muon.buffers):
            buffer.copy_(tensors[f"muon.{i}"])
        for i, p in enumerate(self.rest):
            prefix = f"adam.{i}."
            self.adam.state[p] = {
                k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
            }
        self.step = int(metadata["step"])


def settings_key(args: argparse.Namespace) -> str:
    return json.dumps(
        {k: getattr(args, k) for k in ("seed", "steps", "tokens", "lr")}, sort_keys=True
    )


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bfloat16), tokenizer, chat template and defaults as a model folder."""
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=512,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for file in out.iterdir():
        file.chmod(0o644)


def train(args: argparse.Namespace) -> None:
    """Train by the options of train_reasoner.py, from the state in `args.work` if any."""
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    run = Run(args, tokenizer)
    state = args.work / "state.safetensors"
    if state.exists():
        run.load(state)
    started, first, seen = time.monotonic(), run.step, 0
    for ids in batches(tokenizer, args.seed, run.step, args.tokens):
        if run.step >= min(args.steps, args.stop_after or args.steps):
            break
        loss = run.train_step(ids)
        seen += int((ids != IGNORED).sum())
        if run.step % 20 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {run.step}/{args.steps} loss {loss:.4f} {seen / seconds:.0f} tokens/s "
                f"{seconds / (run.step - first):.2f} s/step",
                flush=True,
            )
        if run.step % args.save_every == 0:
            run.save(state)
    run.save(state)
    if run.step >= args.steps:
        export(run.model, tokenizer, args.out)
        print(f"wrote {args.out} after {time.monotonic() - started:.0f} s")
