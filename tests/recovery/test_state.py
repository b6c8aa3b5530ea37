import subprocess
import sys

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery import state as module
from rac_modifier.recovery.sharded import Whole
from rac_modifier.recovery.state import Progress, hold, load_state, save_state


def trained(steps: int):
    torch.manual_seed(0)
    parameters = {
        "w": torch.nn.Parameter(torch.randn(4, 3)),
        "b": torch.nn.Parameter(torch.randn(3)),
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        (parameters["w"].square().sum() + parameters["b"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Whole(None, parameters), optimizer


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    parameters, optimizer = trained(3)
    progress = Progress("key", 3, {"w": torch.ones(4, 3)}, 2, 0.25, [(0, 0.5), (2, 0.25)])
    save_state(tmp_path, progress, parameters, optimizer)
    others, other_optimizer = trained(0)
    found = load_state(tmp_path, "key", others, other_optimizer)
    assert torch.equal(found.best.pop("w"), torch.ones(4, 3))
    assert found == Progress("key", 3, {}, 2, 0.25, [(0, 0.5), (2, 0.25)])
    assert all(
        torch.equal(others.parameters[name], parameters.parameters[name]) for name in ("w", "b")
    )
    for name, parameter in parameters.parameters.items():
        for part, value in optimizer.state[parameter].items():
            assert torch.equal(other_optimizer.state[others.parameters[name]][part], value), part


def test_a_state_of_another_run_changes_nothing(tmp_path):
    save_state(tmp_path, Progress("key", 3), *trained(3))
    parameters, optimizer = trained(0)
    start = parameters.parameters["w"].detach().clone()
    assert load_state(tmp_path, "other", parameters, optimizer) == Progress("other")
    assert torch.equal(parameters.parameters["w"], start)
    assert not optimizer.state


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path, Progress("key", 3), *trained(3))
    before = (tmp_path / "recovery.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RacError, match=r"cannot be written \(.*No space left.*start the same command again"
    ):
        save_state(tmp_path, Progress("key", 4), *trained(4))
    assert (tmp_path / "recovery.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.safetensors"]


HOLDER = """
import sys
from pathlib import Path
from rac_modifier.recovery.state import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_keeps_this_one_out_of_a_folder_until_it_ends(tmp_path):
    folder = tmp_path / "rac_recovery" / "model"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(
                RacError, match=rf"another process \(pid {other.pid}\).*recover\.folder"
            ):
                hold(folder)
        other.kill()
        other.wait()
        hold(folder).close()  # a killed one holds nothing


def test_a_failed_run_does_not_keep_out_the_next_one_of_its_process(tmp_path):
    first = hold(tmp_path)
    second = hold(tmp_path)
    assert not first.closed
    first.close()
    second.close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RacError, match=r"name another folder \(recover\.folder\)"):
        hold(tmp_path / "file" / "state")
