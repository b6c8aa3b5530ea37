"""`rac recover`: models and settings that it refuses before anything is trained."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cli.recover_options import OPTIONS
from tests.llmcompressor.quantized_helpers import SCHEMES, saved
from tests.tiny import save_tiny


def test_a_model_that_another_method_quantized_is_refused(rac, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    code, _, stderr = rac("recover", tiny_folder, tmp_path / "in", tmp_path / "out", *OPTIONS)
    assert code != 0
    assert "quantized by 'gptq'; recovery reads and writes compressed-tensors" in " ".join(
        stderr.split()
    )


@pytest.mark.parametrize("dense", ["another", "dense"])
def test_models_that_do_not_belong_together_are_refused(
    rac, tiny_folder, sparse_folder, tmp_path, monkeypatch, dense
):
    monkeypatch.chdir(tmp_path)
    if dense == "another":
        save_tiny(tmp_path / "another", seed=5)
        code, _, stderr = rac("recover", "another", sparse_folder, "out", *OPTIONS)
        wanted = "was not made from this Qwen3ForCausalLM: their embeddings or heads differ; name the dense"
    else:
        code, _, stderr = rac("recover", tiny_folder, tiny_folder, "out", *OPTIONS)
        wanted = "there is no mask to hold; prune the model first"
    assert code != 0
    assert wanted in " ".join(stderr.split())
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_sparse_or_quantized_is_refused(
    rac, tiny_folder, sparse_folder, tmp_path, monkeypatch
):
    """Embeddings and head are the dense model's, so that nothing else tells them apart; the two folders may be swapped."""
    monkeypatch.chdir(tmp_path)
    code, _, stderr = rac("recover", sparse_folder, tiny_folder, "out", *OPTIONS)
    assert code == 1
    said = " ".join(stderr.split())
    assert (
        "is sparse (14 of its 15 linear layers), and the first model has to be the dense one"
        in said
    )
    saved(save_tiny(tmp_path / "int4"), SCHEMES["int3"], pruned=False)
    code, _, stderr = rac("recover", "int4", sparse_folder, "out", *OPTIONS)
    assert code == 1
    assert "int4 is quantized, and the first model has to be the dense one" in " ".join(
        stderr.split()
    )
    assert not (tmp_path / "rac_traces").exists()


def test_a_setting_that_is_not_one_is_refused(rac, tiny_folder, sparse_folder, tmp_path):
    code, _, stderr = rac(
        "recover", tiny_folder, sparse_folder, tmp_path / "out", "--set", "steps=3"
    )
    assert code != 0
    assert "steps: there is no such setting" in stderr
    code, _, stderr = rac(
        "recover",
        tiny_folder,
        sparse_folder,
        tmp_path / "out",
        "--set",
        "generic.sequence_tokens=64",
    )
    assert code == 1
    assert "has no effect with generic_share: 0; leave it out" in stderr
