"""LoRA adapters of PEFT on a sparse model add nothing to a pruned weight: in training and at the merge."""

import copy

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery.fixed_mask import fixed_mask, sparse_masks
from tests.recovery.recovery_helpers import dense_and_sparse

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'rac-modifier[trl]'")

LORA = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj", "lm_head"],
    "lora_dropout": 0.0,
}
IDS = torch.tensor([[5, 9, 17, 30, 8, 44]])


def adapted(model, **changes):
    """With adapters, as they are at the start: B is zero."""
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **{**LORA, **changes}))


def train(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_hand(start, steps=3):
    """Masked LoRA computed otherwise: the merged weight M o (W + s B A), with autograd through A and B."""
    model = copy.deepcopy(start)
    wrapped = adapted(copy.deepcopy(start))  # for the same A
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A")
    }
    masks = {name.removesuffix(".weight"): mask for name, mask in sparse_masks(start).items()}
    a = {
        name: layer.lora_A["default"].weight.detach().clone().requires_grad_()
        for name, layer in layers.items()
    }
    b = {
        name: torch.zeros_like(layer.lora_B["default"].weight).requires_grad_()
        for name, layer in layers.items()
    }

    def weights():
        return {
            f"{name}.weight": start.get_parameter(f"{name}.weight").detach()
            + 2.0 * (b[name] @ a[name]) * masks.get(name, torch.tensor(True))
            for name in layers
        }

    optimizer = torch.optim.SGD([*a.values(), *b.values()], lr=0.5)
    for _ in range(steps):
        loss = torch.func.functional_call(
            model, weights(), kwargs={"input_ids": IDS, "labels": IDS}
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in weights().items()}


@pytest.mark.parametrize("wrapped", ["before", "inside"])
def test_training_and_merging_are_those_of_the_masked_product(wrapped):
    """Adapters that are there before the context, and those that are added in it, as a trainer does."""
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
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, unmerged, rtol=1e-4, atol=1e-5)
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, start.get_parameter(name)), name
    for name, mask in sparse_masks(start).items():
        assert not bool(merged.get_parameter(name)[~mask].any()), name


def test_a_merge_after_the_context_keeps_the_zeros_too():
    _, sparse = dense_and_sparse()
    masks = sparse_masks(sparse)
    model = adapted(sparse)
    with fixed_mask(model):
        train(model)
    merged = model.merge_and_unload()
    assert all(not bool(merged.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_without_it_the_merge_fills_zeros():
    _, sparse = dense_and_sparse()
    masks = sparse_masks(sparse)
    model = adapted(sparse)
    train(model)
    merged = model.merge_and_unload()
    assert any(bool(merged.get_parameter(name)[~mask].any()) for name, mask in masks.items())


def test_a_disabled_adapter_leaves_the_sparse_model():
    _, sparse = dense_and_sparse()
    with torch.no_grad():
        before = sparse(input_ids=IDS).logits
    model = adapted(sparse)
    with fixed_mask(model):
        train(model)
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_dropout": 0.1}, r"q_proj: lora_dropout cannot be masked; set lora_dropout=0\.0"),
        ({"use_dora": True}, "is a variant of LoRA, which would fill zeros; train full parameters"),
    ],
    ids=["dropout", "DoRA"],
)
def test_what_cannot_be_masked_is_refused(changes, says):
    _, sparse = dense_and_sparse()
    with pytest.raises(RacError, match=says), fixed_mask(adapted(sparse, **changes)):
        pass


def test_adapters_of_another_kind_are_refused():
    _, sparse = dense_and_sparse()
    other = peft.get_peft_model(sparse, peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    with (
        pytest.raises(
            RacError, match="adapter of a pruned weight would fill its zeros; train full"
        ),
        fixed_mask(other),
    ):
        pass
