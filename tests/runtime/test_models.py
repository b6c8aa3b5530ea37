import pytest
import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.quantization import QuantizationStatus

from rac_modifier.errors import RacError
from rac_modifier.runtime import models as model_tools
from rac_modifier.runtime.models import (
    check_fits,
    evaluating,
    is_placed,
    on_accelerator,
    streamed_to_accelerator,
)
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


def test_a_model_on_the_cpu_is_moved_to_the_accelerator_and_back(monkeypatch):
    moves = []
    model = tiny_model()
    monkeypatch.setattr(type(model), "to", lambda self, device: moves.append(str(device)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2 * 10**9)
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


def test_offloaded_weights_are_placed_wherever_they_are_computed_with():
    """What oneshot makes of a model with a device_map."""
    model = tiny_model()
    assert not is_placed(model)
    set_onload_device(model, "cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert is_placed(model)


@pytest.mark.parametrize(("gigabytes", "room"), [(2, 1.0), (40, 2.0)])
def test_room_for_a_forward_pass_is_left(monkeypatch, gigabytes, room):
    """A twentieth of the weights, and at least 1 GB."""
    model = torch.nn.Module()
    weight = torch.empty(gigabytes * 10**9 // 4, device="meta")
    model.register_parameter("weight", torch.nn.Parameter(weight))
    model.alias = model.weight  # counted once
    needed = int((gigabytes + room) * 10**9)
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: needed)
    check_fits(model, torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: needed - 1)
    with pytest.raises(RacError, match=r'GiB are free on cuda, .*device_map="auto"'):
        check_fits(model, torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: None)  # not known: not checked
    check_fits(model, torch.device("cuda"))


def test_compressed_weights_are_counted_dense(monkeypatch):
    model = tiny_model()
    tensors = (*model.parameters(), *model.buffers())
    before = sum(t.numel() * t.element_size() for t in tensors)
    module = model.model.layers[0].mlp.up_proj
    codes = torch.zeros(module.out_features, module.in_features // 8, dtype=torch.int32)
    del module.weight
    module.register_parameter("weight_packed", torch.nn.Parameter(codes, requires_grad=False))
    module.quantization_status = QuantizationStatus.COMPRESSED
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: before + 10**9)
    check_fits(model, torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: before + 10**9 - 1)
    with pytest.raises(RacError, match="are free on cuda"):
        check_fits(model, torch.device("cuda"))


def test_weights_are_streamed_module_by_module_and_stay_where_they_are(monkeypatch):
    model, ids, used = tiny_model(), torch.arange(5)[None], []
    expected, places = model(input_ids=ids).logits, [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(type(model), "to", lambda self, device: pytest.fail(f"moved to {device}"))
    with streamed_to_accelerator(model):
        assert is_placed(model)
        hook = model.lm_head.register_forward_pre_hook(
            lambda m, args: used.append(m._parameters.onload_device)
        )
        assert torch.equal(model(input_ids=ids).logits, expected)
        hook.remove()
    assert used == [torch.device("cpu")]
    assert not is_placed(model)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_free_memory(monkeypatch):
    """That of a device includes what PyTorch holds unused."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 12345}))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 700)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 300)
    free = [model_tools.free_bytes(torch.device(name)) for name in ("cpu", "cuda:0", "meta")]
    assert free == [12345, 1400, None]
