"""The steps of a recovery run, its checks on held-out traces, and its state on disk."""

import contextlib
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from loguru import logger
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import TokenSequence, batches_of_like_length
from rac_modifier.recovery.loss import head_kl, output_head, predicting_states, targets
from rac_modifier.recovery.state import Progress
from rac_modifier.recovery.student import Batch, Student
from rac_modifier.recovery.teacher import StoredTeacher
from rac_modifier.runtime.progress import Phase
from rac_modifier.settings.recovery import RecoverySettings

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_FEWEST_CHECKS, _MOST_CHECKS = 2, 8  # of the held-out KL after the first step
_CHECK_SHARE = 0.1  # of the training time
_EVALUATION_TOKENS = 4096
_SAVE_SECONDS = 300.0  # between two states on disk
_TOO_HIGH = 1.5  # times the KL before: the learning rate is too high


@dataclass(frozen=True)
class Step:
    """The sequences of an optimizer step, in micro-batches of like length."""

    batches: tuple[tuple[TokenSequence, ...], ...]

    @property
    def completion_tokens(self) -> int:
        """Return the tokens in the loss."""
        return sum(len(ids) - prompt for batch in self.batches for ids, prompt in batch)

    @property
    def tokens(self) -> int:
        """Return prompt and completion tokens."""
        return sum(len(ids) for batch in self.batches for ids, _ in batch)


@dataclass
class TrainingLoop:
    """One run over `steps`: `train` ends with the weights of the lowest held-out KL."""

    student: Student  # in evaluation mode
    teacher: StoredTeacher
    held_out: Sequence[TokenSequence]
    masters: Mapping[str, Tensor]  # training starts from these, after the first check
    autocast: torch.dtype | None
    steps: Sequence[Step]
    rates: Sequence[float]  # learning rates, tried one after another
    state: Path | None  # folder

    def __post_init__(self) -> None:
        self.model, self.parameters = self.student.model, self.student.parameters

    def train(self, key: str) -> Progress:
        """Train at one rate; where the held-out KL rises, at the next from the best weights."""
        self.optimizer, run = self._new_optimizer(), Progress(key)
        if self.state is not None:
            run = Progress.load(self.state, key, self.student, self.optimizer)
        if not run.curve:
            kl = self.check(run)
            if not math.isfinite(kl):
                raise RacError(
                    f"the held-out KL before training is {kl}: the {type(self.model).__name__} or "
                    "its dense model overflows; use --precision float32, or leave recover out"
                )
            self._start_from(self.masters)
        while True:
            self._train_at(self.rates[run.tries], run)
            self._start_from(run.best, sharded=True)
            if not run.stopped or run.tries + 1 == len(self.rates):
                self._save(run)  # what comes next, saving the model, may fail
                return run
            logger.warning(f"recovery starts again at a lower learning rate: {run.stopped}")
            run.tries, run.step, run.stopped = run.tries + 1, 0, ""
            if run.best_step == 0:
                self._start_from(self.masters)
            self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _start_from(self, weights: Mapping[str, Tensor], sharded: bool = False) -> None:
        for name, weight in weights.items():
            shard = weight if sharded else self.student.shard(weight)
            self.student.local(self.parameters[name]).copy_(shard)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # fused: a tenth of the time of torch's default on a CPU
        return torch.optim.AdamW(
            self.parameters.values(), lr=self.rates[0], betas=_BETAS, weight_decay=0.0, fused=True
        )

    def _train_at(self, rate: float, run: Progress) -> None:
        """Take the steps that are left, check the held-out KL, and write the state now and then."""
        # A step costs three forward passes, a check one.
        trained = sum(step.tokens for step in self.steps)
        measured = sum(len(ids) for ids, _ in self.held_out)
        checks = max(round(3 * _CHECK_SHARE * trained / measured), _FEWEST_CHECKS)
        every = max(1, math.ceil(len(self.steps) / min(checks, _MOST_CHECKS)))
        before, saved, processes = run.curve[0][1], time.monotonic(), self.student.processes
        with Phase("recovery", len(self.steps), run.step, shown=processes.is_first) as phase:
            while run.step < len(self.steps) and not run.stopped:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * _rate_at(run.step, len(self.steps))
                loss = self.step(self.steps[run.step])
                run.step += 1
                at = f"at learning rate {rate:.2g}"
                if not math.isfinite(loss):
                    run.stopped = f"the loss of step {run.step} is {loss} {at}"
                elif run.step % every == 0 or run.step == len(self.steps):
                    kl = self.check(run)
                    if not kl <= _TOO_HIGH * before:
                        run.stopped = f"held-out KL {kl:.4f} (before: {before:.4f}) {at}"
                phase.advance(
                    f"loss {loss:.4f}, held-out KL {run.curve[-1][1]:.4f} (before: {before:.4f})"
                )
                # the first process decides for all
                late = processes.is_first and time.monotonic() - saved >= _SAVE_SECONDS
                if self.state is not None and processes.sums(float(late))[0] > 0:
                    self._save(run)
                    saved = time.monotonic()

    def _save(self, run: Progress) -> None:
        """Write the state; a full disk is a warning, and the state before remains."""
        if self.state is None:
            return
        try:
            run.save(self.state, self.student, self.optimizer)
        except RacError as error:
            logger.warning(f"training goes on without a new state: {error}")

    def step(self, step: Step) -> float:
        """Take an optimizer step; return the mean KL per completion token."""
        total, processes = 0.0, self.student.processes
        for batch, counts in self.student.share(step.batches):
            # every token of a step weighs the same, however the step is cut into batches
            loss = self._kl(batch)[0] / step.completion_tokens
            (loss * (counts * processes.count)).backward()  # FSDP takes the mean over the processes
            total += loss.item() * counts
        total = processes.sums(total)[0]  # the same bits on all ranks
        self.student.mask()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)  # g <- g min(1, 1 / |g|)
        if math.isfinite(total):  # else Adam's moments would stay nan
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.mask()
        return total

    @torch.no_grad()
    def check(self, run: Progress) -> float:
        """Measure the held-out KL in nats per completion token; keep the weights of the lowest."""
        total = tokens = 0.0
        batches = list(batches_of_like_length(self.held_out, _EVALUATION_TOKENS))
        shares, shown = self.student.share(batches), self.student.processes.is_first
        with Phase("held-out KL of recovery", len(shares), unit="batches", shown=shown) as phase:
            for batch, counts in shares:
                kl_of_batch, count = self._kl(batch)
                total += counts * kl_of_batch.item()
                tokens += counts * count
                phase.advance()
        total, tokens = self.student.processes.sums(total, tokens)
        kl = total / tokens  # over all ranks: each token weighs the same
        run.curve.append((run.step, kl))
        if kl < run.best_kl:
            run.best_kl, run.best_step = kl, run.step
            for name, parameter in self.parameters.items():
                weight = self.student.local(parameter)
                if name in run.best:  # one copy in memory, not two
                    run.best[name].copy_(weight)
                else:
                    run.best[name] = weight.to("cpu", copy=True)
        return kl

    def _kl(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the KL summed over the completion tokens of a batch, and their number."""
        dtype, device = self.autocast, self.model.device.type
        with torch.autocast(device, dtype=dtype) if dtype else contextlib.nullcontext():
            states = predicting_states(self.model, batch)
        rows, copied = targets(batch)
        # the dense model's states at the targets' places, not always at the tokens' own
        dense = self.teacher.states(batch)[rows]
        return head_kl(states, dense, output_head(self.model), copied), len(states)


# The best of three rates at two sizes, 1e-3 at 3.4 M parameters and 2e-4 at 135 M; a power law.
_RATE, _PARAMETERS, _EXPONENT = 2e-4, 135e6, -0.437
_WARM_UP = 0.1  # share of the steps
_LAST = 0.1  # of the highest learning rate, at the last step
# Tokens whose cost equals the fixed cost of a batch on a CPU: passes over weights and gradients.
_BATCH_COST = 64


def default_learning_rate(parameters: int) -> float:
    """Return the highest learning rate by the power law; 3.6e-5 at 7 B, which was not tried."""
    return _RATE * (parameters / _PARAMETERS) ** _EXPONENT  # 2e-4 (n / 135e6)^-0.437


def _rate_at(step: int, steps: int) -> float:
    """Return the share of the highest rate at `step` of `steps`: linear up, then down."""
    # (t + 1) / n_up, then 1 - 0.9 (t + 1 - n_up) / (n - n_up): a tenth at the last step
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 1.0 - (1.0 - _LAST) * (step - rising + 1) / (steps - rising)


def plan_steps(
    sequences: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Step]:
    """Plan passes over `sequences`, each in a new random order, of about `step_tokens` per step.

    A micro-batch has at most `batch_tokens` padded tokens. A process that is alone on a CPU also
    limits its padding: a batch on a GPU costs the time of a thousand tokens, and several processes
    share each batch. Steps are not sorted by length: that would separate the kinds of problems.
    """
    most_padding = _BATCH_COST if device.type == "cpu" and processes == 1 else math.inf

    def step(chosen: list[TokenSequence]) -> Step:
        limit = settings.batch_tokens
        batches = batches_of_like_length(chosen, limit, most_padding=most_padding)
        return Step(tuple(map(tuple, batches)))

    steps: list[Step] = []
    for number in range(settings.passes):
        order = list(sequences)
        random.Random(f"0/{number}").shuffle(order)
        chosen: list[TokenSequence] = []
        tokens = 0
        for sequence in order:
            chosen.append(sequence)
            tokens += len(sequence[0])
            if tokens >= settings.step_tokens:
                steps.append(step(chosen))
                chosen, tokens = [], 0
        # a last step with less than half of the tokens would have a noisy gradient
        if chosen and (not steps or 2 * tokens >= settings.step_tokens):
            steps.append(step(chosen))
    return steps
