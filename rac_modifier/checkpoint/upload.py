"""Send a checkpoint folder to the Hugging Face hub as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from transformers import PreTrainedModel

from rac_modifier.checkpoint.record import CARD_NAME

# What transformers' save_pretrained takes with push_to_hub=True.
OPTIONS = (
    "repo_id",
    "token",
    "private",
    "tags",
    "commit_message",
    "commit_description",
    "revision",
    "create_pr",
)


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    tags: Sequence[str] | None = None,
    **commit: Any,
) -> CommitInfo:
    """Make the repository if it is not there, and commit all files of the folder.

    Args:
        folder: of a checkpoint.
        repo_id: owner/name.
        token: of the hub; None: the one of this machine.
        private: of a new repository.
        tags: added to the tags of the card.
        commit: commit_message, commit_description, revision, create_pr.
    """
    card = Path(folder) / CARD_NAME
    if tags and card.is_file():
        changed = ModelCard.load(card)
        changed.data.tags = list(dict.fromkeys([*(changed.data.tags or []), *tags]))
        changed.save(card)
    api = HfApi(token=token)
    created = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=created, folder_path=folder, **{k: v for k, v in commit.items() if v is not None}
    )


def push_to_hub(
    model: PreTrainedModel, repo_id: str, max_shard_size: int | str | None = None, **options: Any
) -> CommitInfo:
    """Save the model and upload it; transformers' `push_to_hub` would replace our card.

    `options`: as of `upload`.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        sharded: dict[str, Any] = (
            {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        )
        model.save_pretrained(folder, **sharded)
        return upload(folder, repo_id, **options)
