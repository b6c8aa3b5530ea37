"""The steps of a recovery run, its checks on held-out traces, and its state on disk."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence, batches_of_like_length
from rac_modifier.progress import StepProgress
from rac_modifier.recovery.hidden_states import output_head, predicting_states
from rac_modifier.recovery.loss import head_kl
from rac_modifier.recovery.schedule import Step, rate_at
from rac_modifier.recovery.sharded import Whole
from rac_modifier.recovery.state import Progress, load_state, save_state
from rac_modifier.recovery.teacher import StoredTeacher

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_FEWEST_CHECKS, _MOST_CHECKS = 2, 8  # of the held-out KL after the first step
_CHECK_SHARE = 0.1  # of the training time
_EVALUATION_TOKENS = 4096
_TOO_HIGH = 1.5  # times the KL before: the learning rate is too high


@dataclass
class TrainingLoop:
    """One run over `steps`: `train` ends with the weights of the lowest held-out KL.

    Attributes:
        shards: the student, in evaluation mode, and this process's shards of its parameters.
        masters: weights that training starts from; the first check measures the model's own.
        rates: learning rates, tried one after another.
        state: folder of the state, which is written every `save_seconds`.
    """

    shards: Whole
    teacher: StoredTeacher
    held_out: Sequence[TokenSequence]
    masters: Mapping[str, torch.Tensor]
    autocast: torch.dtype | None
    steps: Sequence[Step]
    rates: Sequence[float]
    state: Path | None
    save_seconds: float
    progress: bool

    @property
    def model(self) -> Any:
        """The student."""
        return self.shards.model

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name."""
        return self.shards.parameters

    def train(self, key: str) -> Progress:
        """Train at the first rate; start again at the next one where the held-out KL rises too high.

        The model ends with the best weights.
        """
        self.optimizer = self._new_optimizer()
        done = (
            Progress(key)
            if self.state is None
            else load_state(self.state, key, self.shards, self.optimizer)
        )
        if not done.curve:
            kl = self.check(done)
            if not math.isfinite(kl):
                raise RacError(
                    f"the held-out KL before training is {kl}: the {type(self.model).__name__} or its "
                    "dense model computes values that are not finite; load them with --precision "
                    "float32, or leave recover out"
                )
            self._start_from_masters()
        while True:
            self._train_at(self.rates[done.tries], done)
            self._keep_best(done)
            if not done.stopped or done.tries + 1 == len(self.rates):
                self._save(done)  # what comes next, saving the model, may fail
                return done
            logger.warning(f"recovery starts again at a lower learning rate: {done.stopped}")
            done.tries, done.step, done.stopped = done.tries + 1, 0, ""
            self._start_from_masters()
            self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _start_from_masters(self) -> None:
        for name, master in self.masters.items():
            self.shards.local(self.parameters[name]).copy_(self.shards.part(name, master))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # fused: a tenth of the time of torch's default on a CPU
        return torch.optim.AdamW(
            self.parameters.values(), lr=self.rates[0], betas=_BETAS, weight_decay=0.0, fused=True
        )

    def _train_at(self, rate: float, done: Progress) -> None:
        """Take the steps that are left, check the held-out KL, and write the state now and then."""
        before, every = done.curve[0][1], max(1, math.ceil(len(self.steps) / self._checks()))
        saved = time.monotonic()
        shown = self.progress and self.shards.processes.is_first
        progress = StepProgress("recovery", len(self.steps), done.step, shown=shown)
        with contextlib.closing(progress):
            while done.step < len(self.steps) and not done.stopped:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * rate_at(done.step, len(self.steps))
                loss = self.step(self.steps[done.step])
                done.step += 1
                if not math.isfinite(loss):
                    done.stopped = (
                        f"the loss of step {done.step} is {loss} at learning rate {rate:.2g}"
                    )
                elif done.step % every == 0 or done.step == len(self.steps):
                    kl = self.check(done)
                    if not kl <= _TOO_HIGH * before:
                        done.stopped = (
                            f"held-out KL {kl:.4f} (before: {before:.4f}) at learning rate "
                            f"{rate:.2g}"
                        )
                progress.step(
                    f"loss {loss:.4f}, held-out KL {done.curve[-1][1]:.4f} (before: {before:.4f})"
                )
                if self._is_time(saved):
                    self._save(done)
                    saved = time.monotonic()

    def _checks(self) -> int:
        """Return how many checks take about a tenth of the training time.

        A step costs three forward passes, a check one.
        """
        trained = sum(step.tokens for step in self.steps)
        measured = sum(len(ids) for ids, _ in self.held_out)
        return min(max(round(3 * _CHECK_SHARE * trained / measured), _FEWEST_CHECKS), _MOST_CHECKS)

    def _is_time(self, saved: float) -> bool:
        """Return whether to write a state; the first process decides for all."""
        processes = self.shards.processes
        late = time.monotonic() - saved >= self.save_seconds
        return self.state is not None and processes.sums(float(late and processes.is_first))[0] > 0

    def _save(self, done: Progress) -> None:
        """Write the state; a full disk is a warning, and the state before remains."""
        if self.state is None:
            return
        try:
            save_state(self.state, done, self.shards, self.optimizer)
        except RacError as error:
            logger.warning(f"training goes on without a new state: {error}")

    def step(self, step: Step) -> float:
        """Take an optimizer step; return the mean KL per completion token."""
        total, processes = 0.0, self.shards.processes
        for batch, counts in self.shards.own(step.batches):
            with self._autocast():
                states = predicting_states(self.model, batch)
            loss = (
                head_kl(states, self.teacher.states(batch), output_head(self.model))
                / step.completion_tokens
            )
            (loss * (counts * processes.count)).backward()  # FSDP takes the mean over the processes
            total += loss.item() * counts
        total = processes.sums(total)[0]
        self.shards.mask_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
        if math.isfinite(total):
            self.optimizer.step()
            self.shards.mask_weights()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def check(self, done: Progress) -> float:
        """Measure the held-out KL in nats per completion token; keep the weights of the lowest."""
        total = tokens = 0.0
        for batch, counts in self.shards.own(
            list(batches_of_like_length(self.held_out, _EVALUATION_TOKENS))
        ):
            with self._autocast():
                states = predicting_states(self.model, batch)
            total += (
                counts * head_kl(states, self.teacher.states(batch), output_head(self.model)).item()
            )
            tokens += counts * len(states)
        total, tokens = self.shards.processes.sums(total, tokens)
        kl = total / tokens
        done.curve.append((done.step, kl))
        if kl < done.best_kl:
            done.best_kl, done.best_step = kl, done.step
            for name, parameter in self.parameters.items():
                weight = self.shards.local(parameter)
                if name in done.best:  # one copy in memory, not two
                    done.best[name].copy_(weight)
                else:
                    done.best[name] = weight.to("cpu", copy=True)
        return kl

    @torch.no_grad()
    def _keep_best(self, done: Progress) -> None:
        """Put the weights of the lowest held-out KL back."""
        for name, weight in done.best.items():
            self.shards.local(self.parameters[name]).copy_(weight)

    def _autocast(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)
