import shutil

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier import model_tools
from rac_modifier.cli import models
from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path


def test_the_reasoner_has_a_name_and_all_else_is_a_path_or_id():
    assert models.resolve("reasoner") == str(reasoner_path())
    assert models.resolve("org/model") == "org/model"


@pytest.mark.parametrize("kept", ["config.json", "generation_config.json"])
def test_a_missing_tokenizer_ends_in_the_next_step(tiny_folder, tmp_path, kept):
    """With config.json alone, transformers returns a tokenizer without a vocabulary."""
    shutil.copy(tiny_folder / kept, tmp_path)
    with pytest.raises(RacError, match=r"(?s)no tokenizer could be loaded from .*; do this$"):
        models.load_tokenizer(str(tmp_path), "do this")


@pytest.mark.parametrize("precision", [Dtype.AUTO, Dtype.BFLOAT16])
def test_a_model_is_loaded_with_its_tokenizer_packed_or_not(tiny_folder, sparse_folder, precision):
    dtype = torch.float32 if precision is Dtype.AUTO else torch.bfloat16
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


@pytest.mark.parametrize(("keeps_groups", "sizes"), [(False, 2), (True, 3)])
def test_the_output_must_have_room(tiny_folder, tmp_path, monkeypatch, keeps_groups, sizes):
    """For the weights twice, and what is pruned so far."""
    size = sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    usage = shutil._ntuple_diskusage
    for missing in (0, 1):
        free = usage(0, 0, sizes * size - missing)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: free)
        check = (tmp_path / "new" / "deep", str(tiny_folder))
        if missing:
            with pytest.raises(RacError, match=r"0\.0 GiB are free, the checkpoint needs up to"):
                models.check_output(*check, keeps_groups=keeps_groups)
        else:
            models.check_output(*check, keeps_groups=keeps_groups)


@pytest.fixture
def stored(tmp_path):
    """1,000 float32 numbers, and 300 bfloat16 ones of which 100 are those of an expert."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(1000),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(200, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.7.up_proj.weight": torch.zeros(100, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("precision", "count", "needed"),
    [
        (Dtype.AUTO, 1, 4000 + 400 + 200),
        (Dtype.AUTO, 3, 4000 + 400 + 3 * 200),  # pages of a file are shared, merged experts are not
        (Dtype.BFLOAT16, 3, 3 * 2000 + 400 + 3 * 200),
        (Dtype.FLOAT32, 2, 4000 + 2 * (800 + 400)),
    ],
)
def test_what_each_process_has_for_itself_while_a_model_is_loaded_counts(
    stored, monkeypatch, precision, count, needed
):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    memory = type("Memory", (), {"available": needed})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    models.check_loading(stored, precision)
    memory.available = needed - 1
    says = f"start fewer than {count} processes" if count > 1 else "are available: use a machine"
    with pytest.raises(RacError, match=says):
        models.check_loading(stored, precision)


def test_a_model_is_put_on_the_accelerator_if_it_fits(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    model, _ = models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)
    assert model.device.type == "meta"
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 10**6)
    with pytest.raises(RacError, match=r"are free on cuda, .*: use a device with more memory"):
        models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)
