"""`rac pack` and `rac unpack`: what is printed, written and refused."""

import json
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.hf_quantizer import load_model
from tests.tiny import linears, tiny_model


@pytest.fixture
def pruned(tmp_path) -> Path:
    """A model that somebody else pruned to 2:4, one layer of it unstructured, stored dense."""
    model = tiny_model()
    for name, linear in linears(model).items():
        if "o_proj" in name:
            linear.weight.data[torch.rand_like(linear.weight) < 0.7] = 0
        else:
            linear.weight.data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pack_then_unpack(rac, pruned, tmp_path):
    code, out, err = rac("pack", pruned, tmp_path / "packed")
    assert (code, err) == (0, "")
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if line.startswith(("model.", "lm_head"))
    }
    assert rows["model.layers.0.mlp.up_proj"][:4] == ["128x64", "F32", "2:4", "50.00%"]
    assert rows["model.layers.1.self_attn.o_proj"][2] == "unstructured"
    assert "serves embeddings, output matrices" in " ".join(rows["lm_head"])
    assert "to be packed: 14 of 16 matrices (12 2:4, 2 unstructured), as sparse-bitmask" in out
    assert (
        out.splitlines()[-1]
        == f"packed into {tmp_path / 'packed'}; look at it with: rac inspect {tmp_path / 'packed'}"
    )
    state = load_model(pruned).state_dict()
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in load_model(tmp_path / "packed").state_dict().items()
    )

    code, out, err = rac("unpack", tmp_path / "packed", tmp_path / "dense")
    assert (code, err) == (0, "")
    assert out.startswith("14 modules unpacked, ")
    again = json.loads(rac("pack", pruned, tmp_path / "again", "--json")[1])
    assert again["summary"]["packed_bytes"] < again["summary"]["dense_bytes"]
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in load_model(tmp_path / "dense").state_dict().items()
    )


def test_check_only_looks(rac, pruned, tmp_path):
    before = files(pruned)
    code, out, _ = rac("pack", pruned, "--check")
    assert (code, "to be packed: 14 of 16" in out) == (0, True)
    code, out, _ = rac("pack", pruned, tmp_path / "out", "--check", "--json")
    actual = json.loads(out)
    assert (code, actual["format"], len(actual["matrices"])) == (0, "sparse-bitmask", 16)
    assert files(pruned) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_a_dense_model_is_refused_with_the_same_code_when_it_is_only_checked(
    rac, tiny_folder, tmp_path
):
    for words in (("--check",), (tmp_path / "out",)):
        code, _, err = rac("pack", tiny_folder, *words)
        assert code == 1
        assert err.startswith("error: ")
        assert "nothing to pack: no module would get smaller" in err
    assert not (tmp_path / "out").exists()


def test_wrong_use(rac, pruned, tmp_path):
    code, _, err = rac("pack", pruned)
    assert (code, "rac pack MODEL --check" in err) == (2, True)
    assert rac("unpack", pruned)[0] == 2
    assert rac("pack", tmp_path / "gone", tmp_path / "out")[0] == 1
