"""Recover in a recipe or a checkpoint: prepare on the dense model, then train."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.measure.repeats import loop_at_end
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.pruning.linalg import bf16_is_fast
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.loss import check_head
from rac_modifier.recovery.memory import check_recovery_memory
from rac_modifier.recovery.on_grid import QuantizedWeight
from rac_modifier.recovery.teacher import StoredTeacher
from rac_modifier.runtime.files import hold, remove_folder
from rac_modifier.runtime.models import devices_of, on_accelerator
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.traces.records import Trace

# The compressed model's answers to the prompts of training traces, kept in a file.
OwnAnswers = Callable[[Sequence[TokenSequence], Path], list[TokenSequence]]
_OWN = "own_answers.json"
_OF_OWN = 5  # every fifth own answer is held out, next to held-out traces
# What a run, or a killed one, has in its folder.
_FILES = re.compile(r"teacher(-\d+)?|recovery\.safetensors|own_answers\.json|\.lock|\..+\.tmp")


class RecoveryStage:
    """Train a compressed model towards the dense `model`, on traces that calibration does not use.

    With `keep` the state is left to `remove`. RacError for too little memory, and for a folder
    with files of others.
    """

    def __init__(
        self,
        model: Any,
        settings: RecoverySettings,
        processes: Processes,
        *,
        quantizes: bool,
        keep: bool,
    ):
        places = sorted(devices_of(model))
        if len(places) > 1 or places in (["disk"], ["meta"]):
            raise RacError(
                f"recover: the weights are on {', '.join(places)}, and training needs them on one "
                "device; load the model without device_map"
            )
        check_head(model, (tuple(range(1, 9)), 7))
        if settings.folder is not None and processes.is_first:
            _check_folder(Path(settings.folder))
        self._settings, self._processes = settings, processes
        self._quantizes, self._keep = quantizes, keep
        check_recovery_memory(model, settings, processes, quantizes=quantizes)

    def read_dense(
        self, model: Any, traces: Sequence[Trace], own: OwnAnswers | None = None
    ) -> None:
        """Store the dense model's hidden states on its traces and on `own` answers (RacError)."""
        settings, processes = self._settings, self._processes
        self.held_out, self._training = split_traces(traces, settings.held_out_tokens)
        fingerprint = model_fingerprint(model)
        self.folder = Path(settings.folder or f"rac_recovery/{fingerprint[:16]}")
        step = "name another folder (recover.folder)"
        self._lock = hold(self.folder, step, take_over=True) if processes.is_first else None
        if own is not None:
            answers = own(self._training, self.folder / _OWN) if processes.is_first else []
            trained = set(self._training)  # a dense model that is asked greedily wrote the same
            answers = processes.from_first([a for a in answers if a not in trained])
            self.held_out += answers[::_OF_OWN]
            self._training += [a for i, a in enumerate(answers) if i % _OF_OWN]  # four in five
        check_recovery_memory(
            model, settings, processes, training=self._training, quantizes=self._quantizes
        )
        states = self.folder / "teacher"
        if processes.is_first:
            sequences = [*self.held_out, *self._training]
            with on_accelerator(model):
                StoredTeacher.write(model, sequences, states, key=fingerprint)
        # other machines have copies, each another name: they may share the folder
        self._states = states.with_name(f"teacher-{processes.machine}")
        if not processes.machine:
            self._states = states
        self._receives = processes.rank == processes.machine > 0
        if self._receives:
            remove_folder(self._states)
        processes.copy(states, self._states, needed=self._receives)
        self._teacher = StoredTeacher(self._states)
        logger.info(
            f"recovery: {len(self._training)} traces to train on, and {len(self.held_out)} other "
            "traces that decide what is kept"
        )

    def run(
        self,
        model: Any,
        weights: Mapping[str, torch.nn.Module],
        quantized: Mapping[str, QuantizedWeight],
    ) -> dict[str, Any]:
        """Train the model, whose pruned `weights` stay zero; return the run record's entry."""
        masks = {f"{name}.weight": _mask(m, quantized.get(name)) for name, m in weights.items()}
        device = self._processes.device
        with contextlib.nullcontext() if device is not None else on_accelerator(model):
            result = recover(
                model,
                self._teacher,
                self._training,
                self.held_out,
                self._settings,
                masks=masks,
                quantized=quantized,
                state=self.folder,
                autocast=torch.bfloat16 if bf16_is_fast(device or model.device) else None,
                processes=self._processes,
            )
        if self._receives or (self._processes.is_first and not self._keep):
            self.remove()
        copying = sum(loop_at_end(ids[prompt:]) is not None for ids, prompt in self._training)
        trained_on = "the model's own traces, KL to the dense model"
        return {**result.as_dict(), "ending_in_copies": copying, "trained_on": trained_on}

    def remove(self) -> None:
        """Remove the hidden states and, on the first machine, the state of training."""
        remove_folder(self._states if self._receives else self.folder)
        if self._lock is not None:
            self._lock.close()
        with contextlib.suppress(OSError):  # another run's folder is next to it
            if self._receives:
                self.folder.rmdir()
            self.folder.parent.rmdir()


def _check_folder(folder: Path) -> None:
    """Refuse a folder with files of others, which would be removed with it (RacError)."""
    if folder.name in ("", ".."):
        raise RacError(
            f"recover.folder {str(folder)!r} could not be removed at the end; name a new folder"
        )
    others = [path.name for path in folder.glob("*") if not _FILES.fullmatch(path.name)]
    if others:
        raise RacError(
            f"recover.folder {folder} holds other files ({min(others)!r}), and it is removed at "
            "the end; name a new or empty folder"
        )


def split_traces(
    traces: Sequence[Trace], held_out_tokens: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """Return problems of `held_out_tokens`, which decide what is kept, and others to train on.

    Traces with the id or the prompt of a held-out one are held out too. Repeating tails are cut: of
    traces to train on, behind a few copies.
    """
    held_out: list[TokenSequence] = []
    training: list[TokenSequence] = []
    problems: set[str | tuple[int, ...]] = set()
    tokens = 0
    for trace in traces:
        problem: set[str | tuple[int, ...]] = {trace.problem_id, trace.prompt_ids}
        if tokens < held_out_tokens or problem & problems:
            problems |= problem
            once = trace.without_repeats()
            tokens += once.tokens
            held_out.append(once.sequence)
        else:
            training.append(trace.with_copies().sequence)
    if not training:
        raise RacError(
            f"recover: {len(held_out)} traces of {tokens:,} tokens are all held out, none "
            "is left to train on; raise recover.tokens, or lower recover.held_out_tokens"
        )
    return held_out, training


def _mask(module: torch.nn.Module, quantized: QuantizedWeight | None) -> Tensor:
    """Return where a weight is not zero, or was not before it was rounded."""
    master = quantized.master if quantized is not None else None
    return (module.get_parameter("weight") if master is None else master).detach() != 0
