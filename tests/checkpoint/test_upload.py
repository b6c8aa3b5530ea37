"""Uploads to a stand-in of the hub, up to what it receives."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData, RepoUrl
from transformers import PreTrainedModel

from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.checkpoint.upload import upload
from rac_modifier.settings.pattern import Pattern
from tests.checkpoint.checkpoint_helpers import (
    Saved,
    assert_same_state,
    config_of,
    contents,
    prune_24,
    tiny_model,
)
from tests.tiny import linears


class FakeHub:
    """Stands in for HfApi: keeps what would be sent, if HfApi's methods take the arguments."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, object]] = []
        self.commits: list[dict[str, object]] = []

    def __call__(self, token: str | bool | None = None) -> FakeHub:
        return self

    def create_repo(self, repo_id: str, **options: object) -> RepoUrl:
        inspect.signature(HfApi.create_repo).bind(self, repo_id, **options)
        self.created.append(options)
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.repositories.setdefault(name, {})
        return RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> None:
        names = {"repo_id": repo_id, "folder_path": folder_path}
        inspect.signature(HfApi.upload_folder).bind(self, **names, **options)
        self.repositories[repo_id] = contents(Path(folder_path))
        self.commits.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("rac_modifier.checkpoint.upload.HfApi", fake)
    return fake


def pruned() -> PreTrainedModel:
    model = tiny_model()
    modules = linears(model)
    for linear in modules.values():
        prune_24(linear.weight.data)
    made = SavePlan({"method": "alps"}, dict.fromkeys(modules, Pattern.n_of_m(2, 4)), modules)
    model.config._name_or_path = "owner/base"
    save_with_record(model, lambda: made)
    return model


def received(hub: FakeHub, name: str, folder: Path) -> Path:
    """What the hub has, as a folder."""
    folder.mkdir()
    for path, content in hub.repositories[name].items():
        (folder / path).write_bytes(content)
    return folder


def test_a_packed_folder_arrives_as_it_is(hub: FakeHub, saved: Saved, tmp_path: Path) -> None:
    folder, expected, _ = saved()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    upload(folder, "me/packed", private=True, commit_message="First", token="hf_test")
    assert hub.repositories["me/packed"] == contents(folder)
    assert hub.created[0]["private"] is True
    assert hub.commits[0]["commit_message"] == "First"
    assert_same_state(load_model(received(hub, "me/packed", tmp_path / "again")), expected)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_pruned_model_is_pushed_packed_with_its_card(
    hub: FakeHub, tmp_path: Path, way: str
) -> None:
    model = pruned()
    if way == "push_to_hub":
        model.push_to_hub("me/sparse", tags=["mine"], commit_message="Sparse")
    else:
        options = {"tags": ["mine"], "commit_message": "Sparse"}
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/sparse", **options)
        assert contents(tmp_path / "out") == hub.repositories["me/sparse"]
    again = received(hub, "me/sparse", tmp_path / "again")
    assert (
        config_of(again)["quantization_config"]["sparsity_config"]["format"] == "sparse-24-bitmask"
    )
    assert_same_state(load_model(again), model.state_dict())
    card = ModelCard.load(again / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert (card.data.base_model, card.data.license) == ("owner/base", "unknown")
    assert {"mine", "sparse"} <= set(card.data.tags)
    assert "| Solver | alps |" in card.content
    assert hub.commits[0]["commit_message"] == "Sparse"
    assert json.loads((again / "rac_run.json").read_text())["base_model"] == "owner/base"
