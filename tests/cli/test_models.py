import shutil
import weakref
from functools import partial

import pytest
import torch

from rac_modifier.cli import models
from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path
from rac_modifier.runtime import models as model_tools


def test_the_reasoner_has_a_name_and_all_else_is_a_path_or_id():
    assert models.resolve("reasoner") == str(reasoner_path())
    assert models.resolve("org/model") == "org/model"


@pytest.mark.parametrize("kept", ["config.json", "generation_config.json"])
def test_a_missing_tokenizer_ends_in_the_next_step(tiny_folder, tmp_path, kept):
    """With config.json alone, transformers returns a tokenizer without a vocabulary."""
    shutil.copy(tiny_folder / kept, tmp_path)
    with pytest.raises(RacError, match=r"(?s)no tokenizer could be loaded from .*; do this$"):
        models.load_tokenizer(str(tmp_path), "do this")


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_model_is_loaded_with_its_tokenizer_packed_or_not(tiny_folder, sparse_folder, precision):
    dtype = torch.float32 if precision == "auto" else torch.bfloat16
    for folder in (tiny_folder, sparse_folder):
        model, tokenizer = models.load(str(folder), precision)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert tokenizer("x")["input_ids"]
    zeros = model.get_submodule("model.layers.0.mlp.up_proj").weight == 0
    assert zeros.float().mean() == 0.5


def test_oneshot_gets_the_path_unless_the_weights_are_packed(tiny_folder, sparse_folder):
    assert models._unpacked(str(tiny_folder), "auto") == str(tiny_folder)
    assert models._unpacked("org/model", "auto") == "org/model"
    assert isinstance(models._unpacked(str(sparse_folder), "auto"), torch.nn.Module)


@pytest.mark.parametrize(("keeps_groups", "sizes"), [(False, 2), (True, 3)])
def test_the_output_must_have_room(tiny_folder, tmp_path, monkeypatch, keeps_groups, sizes):
    """For the weights twice, and what is pruned so far."""
    needed = sizes * sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    free = [needed]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    check = (tmp_path / "new" / "deep", str(tiny_folder))
    models.check_output(*check, keeps_groups=keeps_groups)
    free[0] -= 1
    with pytest.raises(RacError, match=r"0\.0 GiB are free, the checkpoint needs up to"):
        models.check_output(*check, keeps_groups=keeps_groups)


def test_a_model_that_does_not_fit_into_memory_is_refused(tiny_folder, monkeypatch):
    size = sum(file.stat().st_size for file in tiny_folder.glob("*.safetensors"))
    memory = type("Memory", (), {"available": size})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    models.check_loading(str(tiny_folder))
    memory.available //= 2
    with pytest.raises(RacError, match="GiB are available: use a machine with more memory"):
        models.check_loading(str(tiny_folder))


def test_a_model_is_put_on_the_accelerator_if_it_fits(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    model, _ = models.load_on_accelerator(str(tiny_folder), "auto")
    assert model.device.type == "meta"
    dropped = torch.nn.Linear(1, 1)
    dropped.forward, alive = partial(dropped.forward), weakref.ref(dropped)  # refers to itself
    del dropped
    models.load_on_accelerator(str(tiny_folder), "auto")
    assert alive() is None, "a quantized model would stay on the device"
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 10**6)
    with pytest.raises(RacError, match=r"are free on cuda, .*: use a device with more memory"):
        models.load_on_accelerator(str(tiny_folder), "auto")
