import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.recovery import teacher as module
from rac_modifier.recovery.loss import predicting_states
from rac_modifier.recovery.teacher import StoredTeacher, check_dense, check_made_from, name_of
from tests import tiny
from tests.recovery.recovery_helpers import dense_and_sparse, sequences


def test_stored_states_equal_the_models_own(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_TOKENS", 80)
    dense, _ = dense_and_sparse()
    data = sequences(6)
    StoredTeacher.write(dense, data, tmp_path, key="a")
    assert len(list(tmp_path.glob("states-*.safetensors"))) > 1
    batch = [data[4], data[1]]
    with torch.no_grad():
        expected = predicting_states(dense, batch)
    states = StoredTeacher(tmp_path).states(batch)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_they_are_computed_again_for_another_model_or_after_a_kill(tmp_path):
    dense, data = dense_and_sparse()[0], sequences(2)
    other, _ = dense_and_sparse(seed=1)

    def written(model, key):
        return StoredTeacher.write(model, data, tmp_path, key=key).states(data)

    first = written(dense, "a")
    assert torch.equal(written(other, "a"), first)  # the key says it is the same
    assert not torch.equal(written(other, "b"), first)
    assert StoredTeacher(tmp_path).key == "b"
    (tmp_path / "index.json").write_text('{"model": "a", "seq')
    (tmp_path / "states-00000.safetensors").write_bytes(b"cut")
    assert torch.equal(written(dense, "a"), first)


def test_what_cannot_work_is_refused(tmp_path):
    dense, data = dense_and_sparse()[0], sequences(3)
    teacher = StoredTeacher.write(dense, data[:2], tmp_path / "a", key="a")
    with pytest.raises(RacError, match="no states of"):
        teacher.states(data)
    (tmp_path / "a" / "states-00000.safetensors").write_bytes(b"cut")
    with pytest.raises(RacError, match="the dense model's states cannot be read"):
        StoredTeacher(tmp_path / "a")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    (model, _), data = dense_and_sparse(), sequences(6)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 80)
    written, save_file = [], module.save_file

    def full(tensors, path):
        save_file(tensors, path)
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(RacError, match=r"cannot be written \(.*No space left.*make room"):
        StoredTeacher.write(model, data, tmp_path, key="k")
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_names_tell_prompts_and_ids_apart():
    pairs = [([1, 2, 3], 1), ([1, 2, 3], 2), ([1, 23], 1), ([12, 3], 1)]
    assert len({name_of(pair) for pair in pairs}) == 4
    assert name_of(((1, 2, 3), 1)) == name_of(([1, 2, 3], 1))


@pytest.mark.parametrize("part", ["model.embed_tokens", "lm_head"])
def test_another_embedding_head_or_architecture_is_another_model(part):
    dense, other = tiny.tiny_model(), tiny.tiny_model()
    check_made_from(other, dense)
    other.get_submodule(part).weight.data[3, 3] += 1
    with pytest.raises(RacError, match="their embeddings or heads differ"):
        check_made_from(other, dense)
    other.get_submodule(part).quantization_scheme = "as compressed-tensors marks it"
    check_made_from(other, dense)
    other.load_state_dict(dense.state_dict())
    other.__class__ = type("Other", (type(dense),), {})
    with pytest.raises(RacError, match="the Other to recover was not made from this Qwen3For"):
        check_made_from(other, dense)


def test_a_teacher_is_sparse_where_most_of_its_layers_are():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    for linear in model[:2]:
        linear.weight.data[:, ::2] = 0
    check_dense(model, "teacher")
    model[2].weight.data[:, ::2] = 0
    with pytest.raises(RacError, match=r"sparse \(3 of its 4 linear layers\)"):
        check_dense(model, "teacher")
