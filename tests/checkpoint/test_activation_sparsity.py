"""Thresholds next to a checkpoint: what is written is read, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint.activation_sparsity import (
    InputThresholds,
    read_thresholds,
    write_thresholds,
)
from rac_modifier.errors import RacError

FILE = "activation_sparsity/thresholds.safetensors"


def checkpoint(folder: Path) -> Path:
    """Two layers that read one x, one of packed words, and another."""
    torch.manual_seed(0)
    tensors = {
        "a.q.weight": torch.randn(5, 8).bfloat16(),
        "a.k.weight_packed": torch.randint(-99, 99, (3, 1), dtype=torch.int32),
        "a.k.weight_shape": torch.tensor([3, 8]),
        "b.weight": torch.randn(2, 6).to(torch.float8_e4m3fn),
        "norm.weight": torch.randn(8),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def given(**changes) -> InputThresholds:
    values = {
        "thresholds": {"a.q": torch.rand(8), "b": torch.zeros(6)},
        "groups": {"a.q": ("a.q", "a.k"), "b": ("b",)},
        "share": 0.4,
        "predicted_kl": 0.019,
    }
    return InputThresholds(**{**values, **changes})


def rewrite(folder: Path, *, tensors=None, **about) -> None:
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = {**file.metadata(), **about}
    save_file({**load_file(folder / FILE), **(tensors or {})}, folder / FILE, metadata)


def test_what_is_written_is_read(tmp_path):
    assert read_thresholds(checkpoint(tmp_path)) is None
    before, written = (tmp_path / "model.safetensors").read_bytes(), given()
    write_thresholds(tmp_path, written)
    read = read_thresholds(tmp_path)
    assert read is not None
    assert (read.groups, read.share, read.predicted_kl) == (written.groups, 0.4, 0.019)
    assert torch.equal(read.thresholds["a.q"], written.thresholds["a.q"])
    assert read.by_module().keys() == {"a.q", "a.k", "b"}
    assert read.by_module()["a.k"] is read.thresholds["a.q"]
    assert load_file(tmp_path / FILE).keys() == {"a.q.input_thresholds", "b.input_thresholds"}
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["a.q.weight", "a.k.weight_packed", "b.weight"])
def test_thresholds_of_other_weights(tmp_path, name):
    write_thresholds(checkpoint(tmp_path), given())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    assert read_thresholds(tmp_path) is not None  # no layer that they belong to
    tensors[name].view(torch.uint8)[0, 0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(RacError, match="other weights"):
        read_thresholds(tmp_path)


BAD_TENSORS = {
    "NaN": (torch.tensor([0, 1, 2, 3, float("nan"), 5]), "b: a threshold is negative or not"),
    "infinite": (torch.full((6,), torch.inf), "b: a threshold is negative or not finite"),
    "negative": (torch.full((6,), -1e-9), "b: a threshold is negative or not finite"),
    "too short": (torch.zeros(5), "b: torch.float32 .5. instead of torch.float32 .6."),
    "no vector": (torch.zeros(6, 1), "b: torch.float32 .6, 1. instead"),
    "another type": (torch.zeros(6).double(), "b: torch.float64 .6. instead"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_thresholds(tmp_path, case):
    values, message = BAD_TENSORS[case]
    write_thresholds(checkpoint(tmp_path), given())
    rewrite(tmp_path, tensors={"b.input_thresholds": values})
    with pytest.raises(RacError, match=message):
        read_thresholds(tmp_path)


BAD_METADATA = {
    "an unknown module": {"groups": [["a.q", "a.k", "a.v"], ["b"]]},
    "a missing group": {"groups": [["a.q", "a.k"]]},
    "a group without modules": {"groups": [["a.q", "a.k"], ["b"], []]},
    "a module twice": {"groups": [["a.q", "b"], ["b"]]},
    "another width": {"groups": [["a.q"], ["b", "a.k"]]},
    "no list": {"groups": 7},
    "a share of NaN": {"share": "nan"},
    "a share of all": {"share": "1.0"},
    "no number": {"predicted_kl": "little"},
    "another digest": {"weights": "0"},
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_metadata(tmp_path, case):
    write_thresholds(checkpoint(tmp_path), given())
    changes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in BAD_METADATA[case].items()}
    rewrite(tmp_path, **changes)
    with pytest.raises(RacError, match="cannot be read as thresholds of activation sparsity"):
        read_thresholds(tmp_path)


def test_a_file_that_is_none(tmp_path):
    write_thresholds(checkpoint(tmp_path), given())
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:40])
    with pytest.raises(RacError, match="cannot be read as thresholds"):
        read_thresholds(tmp_path)
    save_file({"b.input_thresholds": torch.zeros(6)}, tmp_path / FILE)
    with pytest.raises(RacError, match="cannot be read as thresholds"):
        read_thresholds(tmp_path)
