"""Reasoning-aware pruning in one file, with torch and transformers alone.

    python examples/rac_in_one_file.py MODEL OUTPUT    # MODEL: folder or hub id with chat template

1. Sample: the model answers questions; its own chains of thought are the calibration data.
2. Hessian: H = 2/n X^T X of the inputs X [tokens, d] of each linear layer, on those traces.
3. SparseGPT (arXiv 2301.00774): 2 of every 4 weights become zero; each error is corrected by the
   weights of later inputs. Layer by layer: a layer reads what the pruned layers before it compute.
4. Save: an ordinary checkpoint with zeros in it; `rac pack` makes it smaller.

What the package adds: the dense model's outputs as the target, ALPS, a refit, recovery,
int2 to int8, experts, servers that sample, resume after a kill, memory of one layer,
kernels that use the zeros.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

N, M = 2, 4  # zeros in a group of consecutive inputs
DAMPENING = 0.01  # of the mean of H's diagonal
BLOCK = 128  # inputs whose errors are passed on together


@torch.no_grad()
def sample(model, tokenizer, questions: list[str], max_new_tokens: int) -> list[torch.Tensor]:
    """Return a trace for each question: the ids of prompt and completion, with the EOS."""
    traces = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        trace = model.generate(
            prompt.to(model.device),
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=0.6,
            top_p=0.95,
            top_k=0,
            max_new_tokens=max_new_tokens,
        )
        traces.append(trace)
    return traces


@torch.no_grad()
def hessians(model, modules: dict[str, torch.nn.Linear], traces: list[torch.Tensor]):
    """Return H = 2/n X^T X [d, d] of the inputs of each module, over all tokens of the traces."""
    sums = {name: torch.zeros(m.in_features, m.in_features) for name, m in modules.items()}

    def adds_to(name: str):
        def hook(module, inputs):
            x = inputs[0].reshape(-1, module.in_features).float()
            sums[name].addmm_(x.T, x)

        return hook

    hooks = [m.register_forward_pre_hook(adds_to(name)) for name, m in modules.items()]
    for trace in traces:
        model(input_ids=trace)
    for hook in hooks:
        hook.remove()
    tokens = sum(trace.numel() for trace in traces)
    return {name: 2 / tokens * total for name, total in sums.items()}


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune W [rows, d] to 2:4. Returns the new weights, and the mask of the weights that stay.

    With H^-1 = R^T R (R upper triangular), pruning the weight of input j makes the error
    e = w_j / R_jj, and the weight of each later input k becomes w_k - e R_jk. The weights with the
    lowest (w_j / R_jj)^2 of each group of M are pruned, scored when all inputs before the
    group are done.
    """
    w = weight.double()  # a new tensor
    dead = hessian.diagonal() == 0  # inputs that are zero on every token
    damped = hessian.double() + DAMPENING * hessian.double().diagonal().mean() * torch.eye(
        len(hessian)
    )
    r = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w[:, dead] = 0
    mask = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if j % M == 0:
                group = slice(j, j + M)
                scores = (w[:, group] / r.diagonal()[group]) ** 2
                lowest = scores.topk(N, dim=1, largest=False).indices
                mask[:, group] = torch.ones_like(mask[:, group]).scatter(1, lowest, False)
            error = torch.where(mask[:, j], 0.0, w[:, j] / r[j, j])
            w[:, j + 1 : stop] -= torch.outer(error, r[j, j + 1 : stop])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ r[start:stop, stop:]
    w[~mask] = 0
    mask[:, dead] = False
    return w.to(weight.dtype), mask


@torch.no_grad()
def prune(model, traces: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prune the decoder's linear layers in place, layer by layer; return masks by name."""
    masks = {}
    for number, layer in enumerate(model.model.layers):
        modules = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        for name, hessian in hessians(model, modules, traces).items():
            weight = modules[name].weight
            pruned, masks[f"{number}.{name}"] = sparsegpt(weight, hessian)
            weight.copy_(pruned)
        print(f"layer {number}: pruned {', '.join(modules)}")
    return masks


def main(source: str, output: str) -> None:
    """Prune a model and save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    questions = [f"What is {17 * i % 89 + 10} + {31 * i % 97 + 10}?" for i in range(32)]
    traces = sample(model, tokenizer, questions, max_new_tokens=256)
    print(
        f"{sum(trace.numel() for trace in traces):,} tokens of the model's own in "
        f"{len(traces)} traces"
    )
    masks = prune(model, traces)
    zeros = 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(
        m.numel() for m in masks.values()
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {zeros:.1%} of the weights of {len(masks)} modules are zero")


if __name__ == "__main__":
    main(*sys.argv[1:])
