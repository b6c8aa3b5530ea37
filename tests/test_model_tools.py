import pytest
import torch

from rac_modifier.model_tools import StopForward, evaluating, on_accelerator
from tests.tiny import tiny_model


def test_evaluating_gives_each_model_its_own_mode_back():
    training, evaluated = tiny_model().train(), tiny_model().eval()
    with evaluating(training, evaluated):
        assert not training.training
        assert not evaluated.training
    assert training.training
    assert not evaluated.training
    with pytest.raises(KeyError), evaluating(training):
        raise KeyError
    assert training.training


def test_stop_forward_ends_a_forward_pass():
    model, seen = tiny_model(), []

    def stop(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].shape)
        raise StopForward

    model.model.layers[0].mlp.register_forward_pre_hook(stop)
    model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append("too far"))
    with pytest.raises(StopForward):
        model(input_ids=torch.arange(5)[None])
    assert seen == [(1, 5, 64)]


def test_a_model_on_the_cpu_is_moved_to_the_accelerator_and_back(monkeypatch):
    moves = []
    model = tiny_model()
    monkeypatch.setattr(type(model), "to", lambda self, device: moves.append(str(device)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with on_accelerator(model):
        assert moves == ["cuda"]
    assert moves == ["cuda", "cpu"]
    with pytest.raises(KeyError), on_accelerator(model):
        raise KeyError
    assert moves == ["cuda", "cpu"] * 2


def test_a_model_that_is_placed_already_is_not_moved(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "to", lambda self, device: pytest.fail(f"moved to {device}"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    model.hf_device_map = {"": "cpu"}
    with on_accelerator(model):
        pass
    del model.hf_device_map
    model.lm_head = model.lm_head.to("meta")
    with on_accelerator(model):
        pass


def test_without_an_accelerator_nothing_is_moved(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "to", lambda self, device: pytest.fail(f"moved to {device}"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with on_accelerator(model):
        pass
