"""The comparison of two served runs, and that it notices a wrong layer. `make gpu-check` serves the model."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rac_modifier.errors import RacError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DENSE = [
    {"read": [-3.0, -2.5], "tokens": [4, 5, 6], "logprobs": [-1.0, -1.1, -1.2]},
    {"read": [-4.0, -1.5], "tokens": [7, 8, 9], "logprobs": [-0.5, -0.6, -0.7]},
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_served

    return gpu_served


def test_the_same_is_the_same(served):
    found = served.compare(DENSE, copy.deepcopy(DENSE))
    assert (found.alike, found.sampled, found.mean, found.largest) == (6, 6, 0.0, 0.0)


def test_tokens_behind_the_first_that_differs_are_not_compared(served):
    """Two about equally likely tokens: both runs took their likeliest, and then went on with other texts."""
    other = copy.deepcopy(DENSE)
    other[1] |= {"tokens": [7, 3, 3], "logprobs": [-0.5, -0.59, -9.0]}
    found = served.compare(other, DENSE)
    assert (found.alike, found.sampled) == (4, 6)
    assert found.largest == pytest.approx(0.01)
    assert found.mean == pytest.approx(
        0.01 / 9
    )  # 4 tokens that were read, 3 and 2 that were sampled


@pytest.mark.parametrize("change", [{"read": [-3.0, -3.0]}, {"logprobs": [-1.0, -1.1, -2.2]}])
def test_a_large_difference_is_an_error(served, change):
    with pytest.raises(RacError, match=r"log-probabilities differ by .* do not use the kernels"):
        served.compare([DENSE[0] | change, DENSE[1]], DENSE)


def test_many_small_differences_are_an_error(served):
    other = [run | {"read": [value - 0.1 for value in run["read"]]} for run in DENSE]
    with pytest.raises(RacError, match=r"differ by 0\.04 in the mean and 0\.1 at most"):
        served.compare(other, DENSE)


def test_what_is_not_a_number_is_an_error(served):
    with pytest.raises(RacError, match="differ by nan"):
        served.compare([DENSE[0] | {"read": [float("nan"), -2.5]}, DENSE[1]], DENSE)


def test_what_was_compared_is_kept_when_the_next_model_does_not_end(served, monkeypatch, tmp_path):
    """`make gpu-check` interrupts it when its time is over."""

    def sample_apart(folder: Path, device: str, kernels: bool):
        if folder.name == "2of4":
            raise KeyboardInterrupt
        return copy.deepcopy(DENSE)

    monkeypatch.setitem(
        sys.modules, "random_model", SimpleNamespace(save_model=lambda *arguments, **options: None)
    )
    monkeypatch.setattr(served, "sample_apart", sample_apart)
    with pytest.raises(KeyboardInterrupt):
        served.check(tmp_path, "cuda", ["2:4 + int4", "2:4"], tmp_path / "served.json")
    assert json.loads((tmp_path / "served.json").read_text()) == {
        "2:4 + int4": {"alike": 6, "sampled": 6, "mean": 0.0, "largest": 0.0}
    }


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_it_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_served.py"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vLLM cannot be imported")
    assert done.stderr.endswith("no model was served\n")
