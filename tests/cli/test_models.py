import shutil

import pytest
import torch
from loguru import logger
from safetensors.torch import save_file

from rac_modifier import model_tools
from rac_modifier.cli import models
from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path


def test_the_reasoner_has_a_name_and_all_else_is_a_path_or_id():
    assert models.resolve("reasoner") == str(reasoner_path())
    assert models.resolve("org/model") == "org/model"


def test_a_model_that_is_not_there_is_named_with_what_may_be_given(tmp_path):
    with pytest.raises(
        RacError, match=r"no model at '.*gone' \(.+\); give a model folder, a Hugging Face id"
    ):
        models.check_model(str(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["gone", "owner/gone"])
def test_a_name_on_a_hub_that_cannot_be_reached_is_refused_at_once(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/{filename}",
    )
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    with pytest.raises(
        RacError,
        match=rf"no model at '{name}' \(no folder here, and the hub cannot be reached: .+\); give",
    ):
        models.check_model(name)


@pytest.mark.parametrize("kept", ["config.json", "generation_config.json"])
def test_a_missing_tokenizer_ends_in_the_next_step(tiny_folder, tmp_path, kept):
    """With config.json alone, transformers returns a tokenizer without a vocabulary."""
    shutil.copy(tiny_folder / kept, tmp_path)
    with pytest.raises(RacError, match=r"(?s)no tokenizer could be loaded from .*; do this$"):
        models.load_tokenizer(str(tmp_path), "do this")


@pytest.mark.parametrize(
    ("precision", "dtype"), [(Dtype.AUTO, torch.float32), (Dtype.BFLOAT16, torch.bfloat16)]
)
def test_a_model_is_loaded_with_its_tokenizer_packed_or_not(
    tiny_folder, sparse_folder, precision, dtype
):
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
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size - 1)
    )
    with pytest.raises(RacError, match=r"0\.0 GiB are free, the checkpoint needs up to 0\.0 GiB"):
        models.check_output(tmp_path / "new", str(tiny_folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size))
    models.check_output(tmp_path / "new", str(tiny_folder))


def test_what_is_pruned_so_far_counts_for_a_pruning_run(tiny_folder, tmp_path, monkeypatch):
    size = sum(f.stat().st_size for f in tiny_folder.glob("*.safetensors"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * size - 1)
    )
    models.check_output(tmp_path / "new", str(tiny_folder))
    with pytest.raises(RacError, match=r"what is pruned so far up to .* next to it"):
        models.check_output(tmp_path / "new", str(tiny_folder), keeps_groups=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * size))
    models.check_output(tmp_path / "new", str(tiny_folder), keeps_groups=True)


def test_a_hub_id_counts_with_what_the_cache_has_of_it(tmp_path, monkeypatch):
    sizes = {"owner/model": 10**9, "owner/not-here": None}
    monkeypatch.setattr("rac_modifier.checkpoint.output_folder.bytes_of_weights", sizes.__getitem__)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * 10**9)
    )
    models.check_output(tmp_path / "new", "owner/model")
    with pytest.raises(
        RacError,
        match=r"1\.9 GiB are free, the checkpoint needs up to 1\.9 GiB .* 0\.9 GiB next to it",
    ):
        models.check_output(tmp_path / "new", "owner/model", keeps_groups=True)
    said = []
    place = logger.add(said.append, format="{message}")
    models.check_output(tmp_path / "new", "owner/not-here", keeps_groups=True)
    logger.remove(place)
    assert said == [
        "owner/not-here is not in the hub's cache yet: the disk is checked for room once the model is loaded\n"
    ]


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
        (Dtype.FLOAT16, 2, 2 * 2 * 1300),
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
    says = (
        f"start fewer than {count} processes, or use"
        if count > 1
        else r"takes .* are available: use a machine with more"
    )
    with pytest.raises(RacError, match=says):
        models.check_loading(stored, precision)


def test_a_model_that_is_not_here_yet_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("psutil.virtual_memory", lambda: pytest.fail("checked"))
    models.check_loading("owner/model", Dtype.AUTO)


def test_a_model_that_does_not_fit_the_accelerator_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 10**6)
    with pytest.raises(
        RacError,
        match=r"are free on cuda, .*: use a device with more memory, or hide it \(CUDA_VISIBLE",
    ):
        models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)


def test_a_model_is_put_on_the_accelerator_where_there_is_one(tiny_folder, monkeypatch):
    model, _ = models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)
    assert model.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    assert models.load_on_accelerator(str(tiny_folder), Dtype.AUTO)[0].device.type == "meta"
