import pytest
import torch

from rac_modifier.checkpoint import files
from rac_modifier.errors import RacError
from rac_modifier.recovery.state import Progress
from rac_modifier.recovery.student import Student
from tests.meeting import together


def trained(steps: int):
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        (parameters["w"].square().sum() + parameters["b"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Student(None, parameters), optimizer


SHAPES = {"w": (4, 3), "b": (3,)}


def test_what_is_saved_comes_back_bit_for_bit_and_only_for_its_run(tmp_path):
    student, optimizer = trained(3)
    curve = [(0, 0.5), (2, 0.25)]
    progress = Progress("key", 3, {"w": torch.ones(4, 3)}, 2, 0.25, curve)
    progress.save(tmp_path, student, optimizer)
    other, other_optimizer = trained(0)
    start = other.parameters["w"].detach().clone()
    assert Progress.load(tmp_path, "other", other, other_optimizer) == Progress("other")
    assert torch.equal(other.parameters["w"], start)
    assert not other_optimizer.state
    progress = Progress.load(tmp_path, "key", other, other_optimizer)
    assert torch.equal(progress.best.pop("w"), torch.ones(4, 3))
    assert progress == Progress("key", 3, {}, 2, 0.25, curve)
    for name, parameter in student.parameters.items():
        assert torch.equal(other.parameters[name], parameter)
        for part, value in optimizer.state[parameter].items():
            assert torch.equal(other_optimizer.state[other.parameters[name]][part], value), part


def test_every_process_gets_its_shard_of_the_state_in_the_folder_of_the_first(tmp_path):
    """The second has another state in its folder, as after a run in which it was the first."""
    student, optimizer = trained(3)
    Progress("key", 3, {"w": torch.ones(4, 3)}).save(tmp_path / "0", student, optimizer)
    Progress("key", 2).save(tmp_path / "1", *trained(2))

    def load(processes):
        cut = Student(None, {}, processes)
        weights = {n: torch.nn.Parameter(torch.zeros(SHAPES[n])) for n in SHAPES}
        cut.parameters = {n: torch.nn.Parameter(cut.shard(w.data)) for n, w in weights.items()}
        moments = torch.optim.AdamW(cut.parameters.values())
        return Progress.load(tmp_path / str(processes.rank), "key", cut, moments), cut, moments

    for progress, cut, moments in together(2, load):
        assert progress.step == 3
        assert torch.equal(progress.best["w"], torch.ones(2, 3))
        for name, parameter in student.parameters.items():
            state = optimizer.state[parameter]
            mine = moments.state[cut.parameters[name]]
            assert torch.equal(cut.parameters[name], cut.shard(parameter))
            assert torch.equal(mine["exp_avg_sq"], cut.shard(state["exp_avg_sq"]))
            assert mine["step"] == state["step"] == 3


def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "recovery.safetensors").write_bytes(b"cut")
    with pytest.raises(RacError, match=r"recovery\.safetensors: the state of a recovery run"):
        Progress.load(tmp_path, "key", *trained(0))


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    Progress("key", 3).save(tmp_path, *trained(3))
    before = (tmp_path / "recovery.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RacError, match=r"cannot be written \(.*No space left.*start the same"):
        Progress("key", 4).save(tmp_path, *trained(4))
    assert (tmp_path / "recovery.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.safetensors"]
