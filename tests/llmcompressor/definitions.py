"""Prune by definition, to compare the loop: what modules read in a model that is run anew."""

import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.settings.pattern import Pattern
from tests.pruning.solving import solve
from tests.tiny import entry

QKV, O_PROJ = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]


def eager(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def run_on(model, store, **settings):
    modifier = ReasoningAwareSparseGPTModifier(**entry(store, **settings))
    oneshot(model=model, recipe=modifier)
    return modifier


def given_to(model, module, loader):
    """The arguments of `module` for all tokens, joined, and the weight of each token."""
    seen = []
    hook = module.register_forward_pre_hook(
        lambda m, args: seen.append([a.detach().flatten(0, -2) for a in args])
    )
    with torch.no_grad():
        for batch in loader:
            model(**batch, use_cache=False)
    hook.remove()
    token_weights = torch.cat([w.flatten() for w in loader.token_weights])
    return [torch.cat(parts) for parts in zip(*seen, strict=True)], token_weights


def moment(x, weights, other=None):
    x, weights = x[weights > 0].double(), weights[weights > 0].double()
    left = x if other is None else other[: len(x)]
    return 2 / weights.sum() * (left * weights.unsqueeze(1)).T @ x


def prune_by_definition(modules, x, x_dense, weights):
    """Prune modules that read `x`; towards the outputs on `x_dense`, if given."""
    moments, used = None, weights > 0
    originals = [module.weight.detach() for module in modules]
    if x_dense is not None:
        cross = moment(x, weights, (x_dense - x)[used].double()).float()
        moments = [weight @ cross for weight in originals]
    solutions = solve(
        "sparsegpt",
        originals,
        moment(x, weights).float(),
        Pattern.parse("2:4", None),
        cross_moment=moments,
        tokens=int(used.sum()),
    )
    for module, solution in zip(modules, solutions, strict=True):
        module.weight.data.copy_(solution.weight)


def assert_close(model, expected):
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        # a tie that rounding turns another way changes single weights; the modules must agree
        close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4).float().mean()
        assert close > 0.98, (name, float(close))
