import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.recovery.fixed_mask import FixedMask, fixed_mask, sparse_masks
from tests.tiny import save_tiny_experts


def small() -> torch.nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    model[0].weight.data[:, ::2] = 0.0
    return model


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> float:
    """Take steps; return the gradient's norm of the last, which is clipped at 1e9."""
    norm = 0.0
    for step in range(steps):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        optimizer.step()
        optimizer.zero_grad()
    return norm


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    ],
)
def test_no_pruned_weight_moves_inside_and_they_do_afterwards(optimizer):
    model = small()
    start = model[0].weight.detach().clone()
    with fixed_mask(model):
        train(model, optimizer(model.parameters()))
    assert torch.equal(model[0].weight == 0, start == 0)
    assert bool((model[0].weight[:, 1::2] != start[:, 1::2]).all())
    train(model, optimizer(model.parameters()))
    assert bool((model[0].weight[:, ::2] != 0).any())


def test_masks_follow_a_model_that_a_trainer_moves():
    model = small()
    held = FixedMask(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        held._parameters["0.weight"] = torch.nn.Parameter(torch.empty(8, 8, device="cuda"))
        held.apply()
    assert held.masks["0.weight"].device.type == "cuda"
    held.release()


def test_a_layer_with_a_twentieth_of_zeros_is_sparse():
    model = torch.nn.Sequential(torch.nn.Linear(20, 1), torch.nn.Linear(21, 1))
    for layer in model:
        layer.weight.data.fill_(1.0)
        layer.weight.data[0, 3] = 0.0
    assert list(sparse_masks(model)) == ["0.weight"]


def test_moments_of_an_earlier_training_do_not_move_pruned_weights():
    """Adam's momentum from before the mask would: the weights are masked after each step too."""
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    start = model[0].weight.detach().clone()
    train(model, optimizer, steps=1)
    model[0].weight.data.copy_(start)
    with fixed_mask(model):
        train(model, optimizer, steps=2)
    assert torch.equal(model[0].weight == 0, start == 0)


def test_masked_gradients_do_not_count_in_the_norm_that_is_clipped():
    model, alone = small(), small()
    with fixed_mask(model):
        norm = train(model, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    alone(x).square().sum().backward()
    alone[0].weight.grad[:, ::2] = 0.0
    expected = torch.cat([p.grad.flatten() for p in alone.parameters()]).norm()
    assert norm == pytest.approx(float(expected), rel=1e-5)


def test_a_weight_that_is_moved_without_the_hooks_is_an_error():
    model, says = small(), r"0\.weight: 8 weights outside the mask are not zero"
    with pytest.raises(RacError, match=says), fixed_mask(model):
        model[0].weight.data[:, 0] = 1.0


def test_dense_models_codes_and_masks_of_another_model_are_refused():
    model, mask = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.ones(4, 8, dtype=torch.bool)
    with pytest.raises(RacError, match="no mask to hold; prune the model first"):
        FixedMask(model)
    with pytest.raises(RacError, match=r"mask of 0\.weight \[4, 8\]: another shape"):
        FixedMask(model, {"0.weight": mask})
    with pytest.raises(RacError, match=r"mask of 1\.weight .*no such parameter"):
        FixedMask(model, {"1.weight": mask})
    model[0].quantization_scheme = "int4"
    with pytest.raises(RacError, match="hold codes, which no trainer of weights can train"):
        FixedMask(model)


def test_zeros_of_merged_experts_stay_zero(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_experts(tmp_path / "experts"))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj.data[:, :, ::2] = 0.0
    start = experts.down_proj.detach().clone()
    with fixed_mask(model):
        model(torch.arange(40).view(2, 20)).logits.square().mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(experts.down_proj == 0, start == 0)
    assert not torch.equal(experts.down_proj, start)
