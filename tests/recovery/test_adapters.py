"""LoRA adapters of PEFT add nothing to a pruned weight, in training and at the merge."""

import copy

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery.fixed_mask import fixed_mask, sparse_masks
from tests.recovery.recovery_helpers import dense_and_sparse

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'rac-modifier[trl]'")

IDS = torch.tensor([[5, 9, 17, 30, 8, 44]])


def lora(**changes):
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    options["target_modules"] = ["q_proj", "down_proj", "lm_head"]
    return peft.LoraConfig(**{**options, **changes})


def adapted(model):
    """With adapters as they are at the start: B is zero."""
    return peft.get_peft_model(model, lora())


def train(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(start, steps=3):
    """Masked LoRA otherwise: the merged weight M o (W + s B A), with autograd through A and B."""
    model = copy.deepcopy(start)
    wrapped = adapted(copy.deepcopy(start))  # for the same A
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A")
    }
    masks = {name.removesuffix(".weight"): mask for name, mask in sparse_masks(start).items()}
    a, b = {}, {}
    for name, layer in layers.items():
        a[name] = layer.lora_A["default"].weight.detach().clone().requires_grad_()
        b[name] = torch.zeros_like(layer.lora_B["default"].weight).requires_grad_()

    def weights():
        return {
            f"{name}.weight": start.get_parameter(f"{name}.weight").detach()
            + 2.0 * (b[name] @ a[name]) * masks.get(name, torch.tensor(True))
            for name in layers
        }

    optimizer = torch.optim.SGD([*a.values(), *b.values()], lr=0.5)
    for _ in range(steps):
        inputs = {"input_ids": IDS, "labels": IDS}
        loss = torch.func.functional_call(model, weights(), kwargs=inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in weights().items()}


@pytest.mark.parametrize("wrapped", ["before", "inside"])
def test_training_and_merging_are_those_of_the_masked_matmul(wrapped):
    """With adapters from before the context, and with those that a trainer adds in it."""
    _, sparse = dense_and_sparse()
    start = copy.deepcopy(sparse)
    torch.manual_seed(0)
    expected = by_hand(start)
    torch.manual_seed(0)
    model = adapted(sparse) if wrapped == "before" else sparse
    with fixed_mask(model):
        if wrapped == "inside":
            torch.manual_seed(0)
            model = adapted(sparse)
        train(model)
        unmerged = model(input_ids=IDS).logits
        with model.disable_adapter(), torch.no_grad():
            disabled = model(input_ids=IDS).logits
    torch.testing.assert_close(disabled, start(input_ids=IDS).logits)
    merged = model.merge_and_unload()  # after the context
    torch.testing.assert_close(merged(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, start.get_parameter(name)), name
    for name, mask in sparse_masks(start).items():
        assert not bool(merged.get_parameter(name)[~mask].any()), name


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lora(lora_dropout=0.1), r"q_proj: lora_dropout cannot be masked; set lora_dropout=0\.0"),
        (lora(use_dora=True), "a variant of LoRA, fills its zeros; train full parameters"),
        (peft.LoHaConfig(r=2, target_modules=["q_proj"]), "adapter of a pruned weight fills"),
    ],
    ids=["dropout", "DoRA", "LoHa"],
)
def test_what_cannot_be_masked_is_refused(config, says):
    _, sparse = dense_and_sparse()
    model = peft.get_peft_model(sparse, config)
    with pytest.raises(RacError, match=says), fixed_mask(model):
        pass
