"""The dense model's hidden states on the training traces: stored on disk.

2 bytes x hidden size per completion token (7 kB at 7B), a hundredth of its logits. The student's head is
the dense model's, so nothing is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence, batches_of_like_length
from rac_modifier.model_tools import evaluating
from rac_modifier.progress import StepProgress
from rac_modifier.recovery.hidden_states import predicting_states

_BATCH_TOKENS = 4096  # padded
_INDEX = "index.json"


class StoredTeacher:
    """Hidden states that `write` stored once, read per batch. `key` names the dense model."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._place: dict[str, str] = {}
        try:
            self.key = str(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["model"])
            for file in sorted(folder.glob("states-*.safetensors")):
                with safe_open(file, framework="pt") as states:
                    self._place |= dict.fromkeys(states.keys(), file.name)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise RacError(
                f"{folder}: the dense model's states cannot be read ({error}); remove the folder"
            ) from error

    @classmethod
    @torch.no_grad()
    def write(
        cls, dense: Any, sequences: Sequence[TokenSequence], folder: Path, *, key: str
    ) -> StoredTeacher:
        """Run the dense model over `sequences`, unless `folder` holds their states already.

        States of another model (`key`) or of other sequences are computed again.

        Raises:
            RacError: a full disk, or a folder that cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RacError(
                f"{folder}: the dense model's states cannot be kept there ({error}); name another "
                "folder (recover.folder)"
            ) from error
        index = folder / _INDEX
        about = json.dumps({"model": key, "sequences": [name_of(s) for s in sequences]})
        if index.exists() and index.read_bytes() == about.encode():
            return cls(folder)
        for old in folder.glob("states-*.safetensors"):
            old.unlink()
        index.unlink(missing_ok=True)
        tokens = sum(len(ids) - prompt for ids, prompt in sequences)
        width = dense.config.get_text_config().hidden_size
        needed = tokens * width * next(dense.parameters()).element_size()
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise RacError(
                f"{folder}: the dense model's states need {needed / 2**30:.1f} GiB, and "
                f"{free / 2**30:.1f} GiB are free; lower recover.tokens or make room"
            )
        try:
            _write_states(dense, sequences, folder)
            index.write_bytes(about.encode())  # last: without it the files do not count
        except (OSError, SafetensorError) as error:
            for part in (index, *folder.glob("states-*.safetensors")):
                part.unlink(missing_ok=True)
            raise RacError(
                f"{folder}: the dense model's states cannot be written ({error}); nothing is left of "
                "them: make room, or name another folder (recover.folder)"
            ) from error
        return cls(folder)

    def states(self, batch: Sequence[TokenSequence]) -> torch.Tensor:
        """Return hidden states [completion tokens, d] of a batch, row by row.

        Raises:
            RacError: a sequence that was not written.
        """
        states = []
        for sequence in batch:
            name = name_of(sequence)
            if name not in self._place:
                raise RacError(
                    f"{self._folder}: no states of a sequence of {len(sequence[0])} tokens; remove "
                    "the folder"
                )
            with safe_open(self._folder / self._place[name], framework="pt") as file:
                states.append(file.get_tensor(name))
        return torch.cat(states)


def _write_states(dense: Any, sequences: Sequence[TokenSequence], folder: Path) -> None:
    """Write a file per batch: the states [completion tokens, d] of each sequence by its name."""
    batches = list(batches_of_like_length(sequences, _BATCH_TOKENS))
    progress, tokens = StepProgress("the dense model's states", len(batches)), 0
    with evaluating(dense), contextlib.closing(progress):
        for number, batch in enumerate(batches):
            states = predicting_states(dense, batch).cpu()
            lengths = [len(ids) - prompt for ids, prompt in batch]
            by_name = {
                name_of(sequence): part.clone()  # a view would be written with its whole batch
                for sequence, part in zip(batch, states.split(lengths), strict=True)
            }
            save_file(by_name, folder / f"states-{number:05}.safetensors")
            tokens += len(states)
            progress.step(f"{tokens:,} tokens")


def name_of(sequence: TokenSequence) -> str:
    """Hash a sequence's ids and its prompt's length."""
    ids, prompt = sequence
    return hashlib.blake2b(
        f"{prompt}:{','.join(map(str, ids))}".encode(), digest_size=16
    ).hexdigest()
