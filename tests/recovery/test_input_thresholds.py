"""Thresholds of activation sparsity, against gradients that are kept whole."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.recovery.input_thresholds import InputScores, groups_that_read_one_input
from tests.tiny import SIZES, save_tiny_experts, tiny_gemma, tiny_model

LAYER = "model.layers.{}."
QKV = tuple(f"self_attn.{n}_proj" for n in "qkv")
READ_TOGETHER = [QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


def columns(model):
    """The bytes of a column of each linear layer in the decoder: a byte per weight."""
    layers = model.named_modules()
    linear = {n: m for n, m in layers if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    return {name: float(module.out_features) for name, module in linear.items()}


def sequences(count=6, length=40):
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randint(3, 300, (length + i,), generator=draw).tolist(), 5 + i) for i in range(count)
    ]


def test_groups_are_the_layers_that_read_one_tensor():
    model = tiny_gemma()
    groups, dense = groups_that_read_one_input(model, columns(model))
    expected = [
        tuple(LAYER.format(i) + n for n in names) for i in (0, 1) for names in READ_TOGETHER
    ]
    assert [group.modules for group in groups] == expected
    assert dense == []
    assert groups[0].column_bytes == 64 + 2 * 32


def test_what_is_not_called_once_is_left_dense():
    model = tiny_model()
    twice, unused = LAYER.format(0) + "mlp.up_proj", "unused"
    model.unused = torch.nn.Linear(4, 4)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + 0 * mlp.down_proj(mlp.up_proj(x))
    groups, dense = groups_that_read_one_input(model, columns(model))
    assert dense == [twice, LAYER.format(0) + "mlp.down_proj", unused]
    assert (LAYER.format(0) + "mlp.gate_proj",) in [group.modules for group in groups]


def kept_whole(model, groups, texts):
    """x and d log p(y) / d x of each group, [tokens, d], from one plain backward pass each."""
    draw, entered = torch.Generator().manual_seed(0), {}
    values = {group.modules[0]: ([], []) for group in groups}

    def hook(module, args, name):
        args[0].retain_grad()
        entered[name] = args[0]

    for name in values:

        def before(module, args, name=name):
            hook(module, args, name)

        model.get_submodule(name).register_forward_pre_hook(before)
    for ids, start in texts:
        embedded = model.get_input_embeddings()(torch.tensor([ids[:-1]])).detach().requires_grad_()
        log_p = model(inputs_embeds=embedded).logits[0, start - 1 :].log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        log_p.gather(1, labels).sum().backward()
        for name, (xs, gs) in values.items():
            xs.append(entered[name].detach()[0, start:].double())
            gs.append(entered[name].grad[0, start:].double())
    return {name: (torch.cat(xs), torch.cat(gs)) for name, (xs, gs) in values.items()}


@pytest.mark.parametrize("share", [0.05, 0.4, 0.8])
def test_thresholds_skip_the_share_at_the_predicted_kl(share):
    model, texts = tiny_model(), sequences()
    groups, _ = groups_that_read_one_input(model, columns(model))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    found = InputScores(model, groups, texts).thresholds(share)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(not m._forward_pre_hooks for m in model.modules())
    skipped = total = predicted = 0.0
    levels = []
    for group, (x, g) in zip(groups, kept_whole(model, groups, texts).values(), strict=True):
        threshold = found.thresholds[group.modules[0]].double()
        small = x.abs() < threshold
        cost = sum(columns(model)[name] for name in group.modules)
        skipped += cost * float(small.double().mean()) * x.shape[1]
        total += cost * x.shape[1]
        predicted += float((x * g * small).sum(1).square().mean() / 2)
        levels.append(threshold * g.square().mean(0).sqrt() / cost**0.5)
    level = torch.cat(levels)
    torch.testing.assert_close(level, level[:1].expand_as(level), rtol=1e-4, atol=0)
    # a step is 1/32 octave, 2.2 %; the density of |x| over its logarithm is at most 0.4
    assert skipped / total == pytest.approx(share, abs=0.4 * 0.022)
    assert found.predicted_kl == pytest.approx(predicted, rel=0.05)
    assert found.share == share


def test_an_input_without_gradient_is_always_skipped():
    model = tiny_model()
    for name in QKV:
        model.get_submodule(LAYER.format(0) + name).weight.data[:, 7] = 0.0
    groups, _ = groups_that_read_one_input(model, columns(model))
    values = InputScores(model, groups, sequences()).thresholds(0.3).thresholds
    first = values[LAYER.format(0) + "self_attn.q_proj"]
    assert first[7] == torch.finfo(torch.float32).max
    assert first[8] < 100


def test_logits_that_the_head_does_not_decide():
    config = Gemma2Config(**SIZES, intermediate_size=64, final_logit_softcapping=1.0)
    model = Gemma2ForCausalLM(config).eval()
    groups, _ = groups_that_read_one_input(model, columns(model))
    with pytest.raises(RacError, match="leave activation_sparsity out"):
        InputScores(model, groups, sequences())


def test_experts_are_not_layers_that_all_tokens_read(tmp_path):
    from rac_modifier.checkpoint.hf_quantizer import load_model

    model = load_model(save_tiny_experts(tmp_path, "qwen2"))
    groups, _ = groups_that_read_one_input(model, columns(model))
    shared = "mlp.shared_expert.{}_proj"
    names = (LAYER.format(0) + shared.format("gate"), LAYER.format(0) + shared.format("up"))
    assert names in [group.modules[:2] for group in groups]
    assert not [n for g in groups for n in g.modules if ".experts." in n]
