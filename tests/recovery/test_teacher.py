import shutil
from collections import namedtuple

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery import teacher as module
from rac_modifier.recovery.hidden_states import predicting_states
from rac_modifier.recovery.teacher import StoredTeacher, name_of
from tests.recovery.recovery_helpers import LiveTeacher, dense_and_sparse, sequences


def test_stored_states_equal_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_TOKENS", 80)
    dense, _ = dense_and_sparse()
    data = sequences(6)
    StoredTeacher.write(dense, data, tmp_path, key="a")
    assert len(list(tmp_path.glob("states-*.safetensors"))) > 1
    teacher = StoredTeacher(tmp_path)
    batch = [data[4], data[1]]
    with torch.no_grad():
        expected = predicting_states(dense, batch)
    torch.testing.assert_close(teacher.states(batch), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(LiveTeacher(dense).states(batch), expected, rtol=0, atol=0)


def test_they_are_computed_again_for_another_model_only(tmp_path):
    dense, _ = dense_and_sparse()
    other, _ = dense_and_sparse(seed=1)
    data = sequences(2)
    first = StoredTeacher.write(dense, data, tmp_path, key="a").states(data)
    assert torch.equal(
        StoredTeacher.write(other, data, tmp_path, key="a").states(data), first
    )  # the key says it is the same
    again = StoredTeacher.write(other, data, tmp_path, key="b")
    assert again.key == StoredTeacher(tmp_path).key == "b"
    assert not torch.equal(again.states(data), first)


def test_a_run_that_was_killed_while_writing_starts_again(tmp_path):
    dense, _ = dense_and_sparse()
    data = sequences(2)
    expected = StoredTeacher.write(dense, data, tmp_path, key="a").states(data)
    (tmp_path / "index.json").write_text('{"model": "a", "seq')
    (tmp_path / "states-00000.safetensors").write_bytes(b"cut")
    assert torch.equal(StoredTeacher.write(dense, data, tmp_path, key="a").states(data), expected)


def test_what_cannot_work_is_refused(tmp_path, monkeypatch):
    dense, _ = dense_and_sparse()
    data = sequences(3)
    teacher = StoredTeacher.write(dense, data[:2], tmp_path / "a", key="a")
    with pytest.raises(RacError, match="no states of a sequence of"):
        teacher.states(data)
    (tmp_path / "a" / "states-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(RacError, match="the dense model's states cannot be read"):
        StoredTeacher(tmp_path / "a")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10))
    with pytest.raises(RacError, match=r"need .* GiB, and .* GiB are free; lower recover\.tokens"):
        StoredTeacher.write(dense, data, tmp_path / "b", key="a")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    (model, _), data = dense_and_sparse(), sequences(6)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 80)
    written = []
    save_file = module.save_file

    def full(tensors, path):
        save_file(tensors, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RacError, match=r"cannot be written \(.*No space left.*nothing is left of them: make room"
    ):
        StoredTeacher.write(model, data, tmp_path, key="k")
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []
    assert len(StoredTeacher.write(model, data, tmp_path, key="k").states(data)) > 0


def test_names_tell_prompts_and_ids_apart():
    names = {
        name_of(([1, 2, 3], 1)),
        name_of(([1, 2, 3], 2)),
        name_of(([1, 23], 1)),
        name_of(([12, 3], 1)),
    }
    assert len(names) == 4
    assert name_of(((1, 2, 3), 1)) == name_of(([1, 2, 3], 1))
