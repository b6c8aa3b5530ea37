"""The dense model: its hidden states on the training traces, on disk, and checks that it is dense.

They take a hundredth of its logits. The student's head is the dense model's, so nothing is lost.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rac_modifier.errors import RacError, refusing
from rac_modifier.measure.teacher_forcing import TokenSequence, batches_of_like_length
from rac_modifier.recovery.fixed_mask import masks_of_zeros
from rac_modifier.recovery.loss import predicting_states
from rac_modifier.runtime.models import evaluating
from rac_modifier.runtime.progress import Phase

_BATCH_TOKENS = 4096  # padded
_INDEX = "index.json"


class StoredTeacher:
    """Hidden states that `write` stored once, read per batch. `key` names the dense model."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._place: dict[str, str] = {}
        problem = f"{folder}: the dense model's states cannot be read"
        damage = (OSError, SafetensorError, ValueError, KeyError)
        with refusing(problem, "remove the folder", *damage):
            self.key = str(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["model"])
            for file in sorted(folder.glob("states-*.safetensors")):
                with safe_open(file, framework="pt") as states:
                    self._place |= dict.fromkeys(states.keys(), file.name)

    @classmethod
    @torch.no_grad()
    def write(
        cls, dense: Any, sequences: Sequence[TokenSequence], folder: Path, *, key: str
    ) -> Self:
        """Run the dense model `key` over `sequences`, unless `folder` holds their states."""
        index = folder / _INDEX
        about = json.dumps({"model": key, "sequences": [name_of(s) for s in sequences]}).encode()
        if index.exists() and index.read_bytes() == about:
            return cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_states(folder)
            _write_states(dense, sequences, folder)
            index.write_bytes(about)  # last: without it the files do not count
        except (OSError, SafetensorError) as error:
            _remove_states(folder)
            raise RacError(
                f"{folder}: the dense model's states cannot be written ({error}); make room, lower "
                "recover.tokens, or name another folder (recover.folder)"
            ) from error
        return cls(folder)

    def states(self, batch: Sequence[TokenSequence]) -> Tensor:
        """Return hidden states [completion tokens, d] of a batch, row by row (RacError: none)."""
        states = []
        for sequence in batch:
            name = name_of(sequence)
            if name not in self._place:
                raise RacError(
                    f"{self._folder}: no states of {len(sequence[0])} tokens; remove the folder"
                )
            with safe_open(self._folder / self._place[name], framework="pt") as file:
                states.append(file.get_tensor(name))
        return torch.cat(states)


def _remove_states(folder: Path) -> None:
    for path in (folder / _INDEX, *folder.glob("states-*.safetensors")):
        path.unlink(missing_ok=True)


def _write_states(dense: Any, sequences: Sequence[TokenSequence], folder: Path) -> None:
    """Write a file per batch: the states [completion tokens, d] of each sequence by its name."""
    batches = list(batches_of_like_length(sequences, _BATCH_TOKENS))
    phase = Phase("the dense model's states", len(batches), unit="batches")
    with evaluating(dense), phase:
        for number, batch in enumerate(batches):
            states = predicting_states(dense, batch).cpu()
            shares = states.split([len(ids) - prompt for ids, prompt in batch])  # by sequence
            # clone: a view would be written with its whole batch
            by_name = {name_of(s): share.clone() for s, share in zip(batch, shares, strict=True)}
            save_file(by_name, folder / f"states-{number:05}.safetensors")
            phase.advance(f"{len(states):,} tokens in the last")


def name_of(sequence: TokenSequence) -> str:
    """Hash a sequence's ids and its prompt's length."""
    text = f"{sequence[1]}:{','.join(map(str, sequence[0]))}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_dense(model: Any, name: str) -> None:
    """Refuse a teacher that is compressed: the two models may be swapped (RacError)."""
    sparse = len(masks_of_zeros(model))
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    how = f"sparse ({sparse} of its {linears} linear layers)" if 2 * sparse > linears else ""
    if any(getattr(module, "quantization_scheme", None) is not None for module in model.modules()):
        how = "quantized"
    if how:
        raise RacError(
            f"{name} is {how}, and the first model has to be the dense one: rac recover DENSE "
            "SPARSE OUT (base_model in rac_run.json names the dense one)"
        )


def check_made_from(pruned: Any, dense: Any) -> None:
    """Refuse a compressed model with another type, embedding or head than the dense (RacError).

    A quantized head is not compared.
    """
    same = type(pruned) is type(dense)
    for end in ("get_input_embeddings", "get_output_embeddings"):
        modules = [getattr(m, end)() for m in (pruned, dense)]
        # a model without a head is refused later
        if None in modules or hasattr(modules[0], "quantization_scheme"):
            continue
        ours, theirs = (module.weight for module in modules)
        same = same and ours.shape == theirs.shape and torch.equal(ours.float(), theirs.float())
    if not same:
        raise RacError(
            f"the {type(pruned).__name__} to recover was not made from this "
            f"{type(dense).__name__}: their embeddings or heads differ; name the dense model that "
            "was compressed (base_model in rac_run.json)"
        )
