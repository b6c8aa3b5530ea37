import shutil

import pytest
import torch

from rac_modifier.cli import models
from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path


def test_the_reasoner_has_a_name_and_all_else_is_a_path_or_id():
    assert models.resolve("reasoner") == str(reasoner_path())
    assert models.resolve("org/model") == "org/model"


def test_a_model_that_is_not_there_is_named_with_what_may_be_given(tmp_path):
    with pytest.raises(RacError, match=r"no model at '.*gone' \(.+\); give a model folder, a Hugging Face id"):
        models.check_model(str(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["gone", "owner/gone"])
def test_a_name_on_a_hub_that_cannot_be_reached_is_refused_at_once(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(
        RacError, match=rf"no model at '{name}' \(no folder here, and the hub cannot be reached: .+\); give"
    ):
        models.check_model(name)


@pytest.mark.parametrize("kept", ["config.json", "generation_config.json"])
def test_a_missing_tokenizer_ends_in_the_next_step(tiny_folder, tmp_path, kept):
    """With config.json alone, transformers returns a tokenizer without a vocabulary."""
    shutil.copy(tiny_folder / kept, tmp_path)
    with pytest.raises(RacError, match=r"(?s)no tokenizer could be loaded from .*; do this$"):
        models.load_tokenizer(str(tmp_path), "do this")


@pytest.mark.parametrize(("precision", "dtype"), [(Dtype.AUTO, torch.float32), (Dtype.BFLOAT16, torch.bfloat16)])
def test_a_model_is_loaded_with_its_tokenizer_packed_or_not(tiny_folder, sparse_folder, precision, dtype):
    for folder in (tiny_folder, sparse_folder):
        model, tokenizer = models.load(str(folder), precision)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert tokenizer("x")["input_ids"]
    zeros = model.get_submodule("model.layers.0.mlp.up_proj").weight == 0
    assert zeros.float().mean() == 0.5


def test_oneshot_gets_the_path_unless_the_weights_are_packed(tiny_folder, sparse_folder):
    assert models.unpacked(str(tiny_folder), Dtype.AUTO) == str(tiny_folder)
    assert models.unpacked("org/model", Dtype.AUTO) == "org/model"
    assert isinstance(models.unpacked(str(sparse_folder), Dtype.AUTO), torch.nn.Module)


def test_the_output_must_be_a_new_or_empty_folder_with_room(tiny_folder, tmp_path, monkeypatch):
    models.check_output(tmp_path / "new" / "deep", str(tiny_folder))
    models.check_output(tmp_path, str(tiny_folder))
    (tmp_path / "file").touch()
    with pytest.raises(RacError, match="is a file; name a folder"):
        models.check_output(tmp_path / "file", str(tiny_folder))
    with pytest.raises(RacError, match="is in use; name an empty or a new one"):
        models.check_output(tmp_path, str(tiny_folder))
    size = sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size - 1))
    with pytest.raises(RacError, match=r"0\.0 GiB are free, the checkpoint needs up to 0\.0 GiB"):
        models.check_output(tmp_path / "new", str(tiny_folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size))
    models.check_output(tmp_path / "new", str(tiny_folder))


def test_a_model_is_put_on_the_accelerator_where_there_is_one(tiny_folder, monkeypatch):
    model, _ = models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)[0].device.type == "meta"
