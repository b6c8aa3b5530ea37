"""The recovery loop: KL to the dense model on its own traces, all kept weights trained, the mask fixed, the best weights kept."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tqdm import tqdm

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence, batches_of_like_length, check_sequences
from rac_modifier.model_tools import evaluating
from rac_modifier.recovery.fixed_mask import fixed_mask, sparse_masks
from rac_modifier.recovery.hidden_states import check_head, output_head, predicting_states
from rac_modifier.recovery.loss import head_kl
from rac_modifier.recovery.on_grid import QuantizedWeight, on_grid
from rac_modifier.recovery.schedule import Step, default_learning_rate, plan_steps, rate_at
from rac_modifier.recovery.state import Progress, load_state, save_state
from rac_modifier.recovery.teacher import Teacher, name_of
from rac_modifier.recovery.trained_parameters import in_float32, trained_name
from rac_modifier.settings.recovery import RecoverySettings

_BETAS = (0.9, 0.95)
_CLIP = 1.0
_CHECKS = 8  # of the held-out KL in a run
_EVALUATION_TOKENS = 4096
_TOO_HIGH = 1.5  # times the KL before: the learning rate is too high
_LOWER, _TRIES = 3.0, 3  # the default learning rate is lowered by this factor, up to so many tries
_SAVE_SECONDS = 300.0


@dataclass(frozen=True)
class Recovery:
    """What a recovery run did; for the run record.

    Attributes:
        kl_before, kl_after: held-out KL(dense || model), nats per completion token, of the weights given and of those kept.
        kept: "after step N", or "before": training did not help, so the weights given are kept.
        stopped: why the last try ended early, or "".
        tries: how often the learning rate was lowered and training started again.
        tokens: prompt and completion tokens of all steps that were done; `completion_tokens` of them in the loss.
        sequences: distinct training traces.
        curve: (step, held-out KL) of every check.
        seconds, cpu_seconds: of training and checks, of this process.
    """

    kl_before: float
    kl_after: float
    kept: str
    stopped: str
    tries: int
    steps: int
    tokens: int
    completion_tokens: int
    sequences: int
    learning_rate: float
    trained_weights: int
    curve: tuple[tuple[int, float], ...]
    seconds: float
    cpu_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The result in one line."""
        return (
            f"recovery: KL {self.kl_before:.4f} -> {self.kl_after:.4f} nats per held-out token ({self.kept}; {self.steps} steps, "
            f"{self.tokens:,} tokens, learning rate {self.learning_rate:.2g}, {self.seconds:.0f} s)"
        )


def recover(
    model: Any,
    teacher: Teacher,
    training: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: RecoverySettings,
    *,
    masks: Mapping[str, torch.Tensor] | None = None,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    state: Path | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = True,
    save_seconds: float = _SAVE_SECONDS,
) -> Recovery:
    """Train `model` in place towards the dense model; it ends with the weights of the lowest held-out KL, perhaps its own.

    Minimises the mean over completion tokens of KL(dense || model) with AdamW; everything is trained but embeddings and head.
    Zeros stay zero. Weights are float32 while they are trained and end in the dtype they came in.

    Args:
        model: a sparse causal LM.
        teacher: the dense model's hidden states on `training` and `held_out`.
        training: traces that calibration did not use.
        held_out: traces of other problems, on which it is decided what is kept.
        settings: steps, learning rate, batches.
        masks: bool by parameter name, True = kept; default: where the model's linear layers are not zero.
        quantized: grid and scales of the modules whose weights are quantized, by module name: they are trained through their
            codes, from their master weights, and end as code times scale.
        state: folder that a killed run goes on from; None keeps no state.
        autocast: dtype of matrix products in forward and backward passes; None: as the weights are.
        save_seconds: how often the state is written.

    Raises:
        RacError: sequences in both sets, none at all, a model whose head is not supported, or a state that cannot be read.
    """
    check_sequences(training)
    check_sequences(held_out)
    both = {name_of(s) for s in training} & {name_of(s) for s in held_out}
    if both:
        raise RacError(f"{len(both)} held-out traces are among the training traces; give traces of other problems")
    check_head(model, min(held_out, key=lambda s: len(s[0])))
    steps = plan_steps(
        training,
        step_tokens=settings.step_tokens,
        batch_tokens=settings.batch_tokens,
        passes=settings.passes,
        seed=settings.seed,
    )
    started, cpu = time.monotonic(), time.process_time()
    masks = sparse_masks(model) if masks is None else masks
    quantized = quantized or {}
    highest = settings.learning_rate or default_learning_rate(sum(p.numel() for p in model.parameters()))
    rates = [highest] if settings.learning_rate else [highest / _LOWER**n for n in range(_TRIES)]
    with (
        in_float32(model),
        on_grid(model, quantized),
        fixed_mask(model, {trained_name(name, quantized): mask for name, mask in masks.items()}) as mask,
        evaluating(model),
    ):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        key = _key(training, held_out, settings, parameters)
        masters = {}
        for name, weight in quantized.items():
            if weight.master is not None:
                trained = trained_name(f"{name}.weight", quantized)
                masters[trained] = weight.master * mask.masks.get(trained, 1)
        run = _Run(model, teacher, held_out, parameters, masters, autocast, steps, rates, state, save_seconds, progress)
        done = run.train(key)
    result = Recovery(
        kl_before=done.curve[0][1],
        kl_after=done.best_kl,
        kept=f"after step {done.best_step}" if done.best_step else "before",
        stopped=done.stopped,
        tries=done.tries,
        steps=done.step,
        tokens=sum(step.tokens for step in steps[: done.step]),
        completion_tokens=sum(step.completion_tokens for step in steps[: done.step]),
        sequences=len(training),
        learning_rate=rates[done.tries],
        trained_weights=sum(p.numel() for p in parameters.values()),
        curve=tuple(done.curve),
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time() - cpu,
    )
    logger.info(result.describe())
    return result


@dataclass
class _Run:
    model: Any
    teacher: Teacher
    held_out: Sequence[TokenSequence]
    parameters: dict[str, torch.nn.Parameter]
    masters: Mapping[str, torch.Tensor]
    autocast: torch.dtype | None
    steps: Sequence[Step]
    rates: Sequence[float]
    state: Path | None
    save_seconds: float
    progress: bool

    def train(self, key: str) -> Progress:
        """Train at the first rate; where the held-out KL rises too high, again from the start at the next. Ends with the best."""
        self.optimizer = self._new_optimizer()
        done = Progress(key) if self.state is None else load_state(self.state, key, self.parameters, self.optimizer)
        if not done.curve:
            self.check(done)
            self._start_from_masters()
        while True:
            self._train_at(self.rates[done.tries], done)
            self._keep_best(done)
            if not done.stopped or done.tries + 1 == len(self.rates):
                return done
            logger.warning(f"recovery starts again at a lower learning rate: {done.stopped}")
            done.tries, done.step, done.stopped = done.tries + 1, 0, ""
            self._start_from_masters()
            self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _start_from_masters(self) -> None:
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters.values(), lr=self.rates[0], betas=_BETAS, weight_decay=0.0)

    def _train_at(self, rate: float, done: Progress) -> None:
        """Take the steps that are left, check the held-out KL `_CHECKS` times, and write the state now and then."""
        before, every = done.curve[0][1], max(1, math.ceil(len(self.steps) / _CHECKS))
        saved = time.monotonic()
        silent = None if self.progress else True  # None: silent where the output is no terminal
        with tqdm(total=len(self.steps), initial=done.step, desc="recovery", unit="step", disable=silent) as bar:
            while done.step < len(self.steps) and not done.stopped:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate * rate_at(done.step, len(self.steps))
                loss = self.step(self.steps[done.step])
                done.step += 1
                if not math.isfinite(loss):
                    done.stopped = f"the loss of step {done.step} is {loss} at learning rate {rate:.2g}"
                elif done.step % every == 0 or done.step == len(self.steps):
                    kl = self.check(done)
                    if not kl <= _TOO_HIGH * before:
                        done.stopped = f"held-out KL {kl:.4f} (before: {before:.4f}) at learning rate {rate:.2g}"
                bar.update()
                bar.set_postfix_str(f"KL {done.curve[-1][1]:.4f}, at the start {before:.4f}", refresh=False)
                if self.state is not None and time.monotonic() - saved >= self.save_seconds:
                    save_state(self.state, done, self.parameters, self.optimizer)
                    saved = time.monotonic()

    def step(self, step: Step) -> float:
        """One optimizer step; returns the mean KL per completion token of its sequences."""
        total = 0.0
        for batch in step.batches:
            with self._autocast():
                states = predicting_states(self.model, batch)
            loss = head_kl(states, self.teacher.states(batch), output_head(self.model)) / step.completion_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
        if math.isfinite(total):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def check(self, done: Progress) -> float:
        """Measure the held-out KL in nats per completion token; keeps the weights if it is the lowest so far."""
        total, tokens = 0.0, 0
        for batch in batches_of_like_length(self.held_out, _EVALUATION_TOKENS):
            with self._autocast():
                states = predicting_states(self.model, batch)
            total += head_kl(states, self.teacher.states(batch), output_head(self.model)).item()
            tokens += len(states)
        kl = total / tokens
        done.curve.append((done.step, kl))
        if kl < done.best_kl:
            done.best_kl, done.best_step = kl, done.step
            done.best = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        return kl

    @torch.no_grad()
    def _keep_best(self, done: Progress) -> None:
        """Put the weights of the lowest held-out KL back."""
        for name, weight in done.best.items():
            self.parameters[name].copy_(weight)

    def _autocast(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=self.autocast)


def _key(
    training: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: RecoverySettings,
    parameters: Mapping[str, torch.nn.Parameter],
) -> str:
    """Changes with anything that the run's result depends on, the weights that it starts from included."""
    digest = hashlib.blake2b(digest_size=16)
    for sequence in (*training, *held_out):
        digest.update(name_of(sequence).encode())
    digest.update(settings.model_dump_json().encode())
    for name, parameter in parameters.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
