"""Recovery: train the kept weights on KL to the dense model, mask fixed, and keep the best."""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor

from rac_modifier.distributed.processes import ALONE, Processes
from rac_modifier.errors import RacError
from rac_modifier.measure.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.recovery.fixed_mask import fixed_mask, sparse_masks
from rac_modifier.recovery.loss import check_head
from rac_modifier.recovery.on_grid import QuantizedWeight, on_grid, trained_name
from rac_modifier.recovery.student import Student, in_float32, recomputing
from rac_modifier.recovery.teacher import StoredTeacher, name_of
from rac_modifier.recovery.training_loop import TrainingLoop, default_learning_rate, plan_steps
from rac_modifier.runtime.models import evaluating
from rac_modifier.settings.recovery import RecoverySettings

_LOWER, _TRIES = 3.0, 3  # factor by which the default learning rate is lowered; most tries


@dataclass(frozen=True)
class Recovery:
    """What a recovery run did; for the run record. KL is held-out, nats per completion token."""

    kl_before: float
    kl_after: float
    kept: str  # "after step N", or "before" where training did not help
    stopped: str  # why the last try ended early
    tries: int  # how often training started again at a lower learning rate
    steps: int
    tokens: int  # prompt and completion tokens of the steps
    sequences: int  # distinct training traces
    learning_rate: float
    processes: int
    curve: tuple[tuple[int, float], ...]  # step and KL of every check
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a KL that is not finite is None."""
        curve = [(step, kl if math.isfinite(kl) else None) for step, kl in self.curve]
        return {**asdict(self), "curve": curve}


def recover(
    model: Any,
    teacher: StoredTeacher,
    training: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: RecoverySettings,
    *,
    masks: Mapping[str, Tensor] | None = None,
    quantized: Mapping[str, QuantizedWeight] | None = None,
    state: Path | None = None,
    autocast: torch.dtype | None = None,
    processes: Processes = ALONE,
) -> Recovery:
    """Train `model` in place towards the dense model; it ends with the lowest held-out KL.

    Minimise the mean over completion tokens of KL(dense || model) with AdamW. All parameters but
    embeddings and head are trained, in float32. Zeros stay zero; dtypes come back at the end.

    Args:
        teacher: the dense model's hidden states on `training` and `held_out`.
        training: traces that calibration did not use.
        held_out: traces of other problems, which decide what is kept.
        masks: bool by parameter name, True = kept; default: the nonzero weights of linear layers.
        quantized: by module name; trained through codes, these end as code times scale.
        state: folder that a killed run goes on from, written every 5 minutes; None: no state.
        autocast: dtype of matmuls in forward and backward passes; None: the weights' dtype.
        processes: train together, each with the same arguments.

    Raises:
        RacError: sequences, a head, logits or a state that cannot be used.
    """
    check_sequences(training)
    check_sequences(held_out)
    if shared := {name_of(s) for s in training} & {name_of(s) for s in held_out}:
        raise RacError(f"{len(shared)} held-out traces are among the training traces; give others")
    check_head(model, min(held_out, key=lambda s: len(s[0])))
    steps = plan_steps(training, settings, model.device, processes.count)
    started = time.monotonic()
    quantized, masks = quantized or {}, sparse_masks(model) if masks is None else masks
    if settings.learning_rate:
        rates = [settings.learning_rate]
    else:
        highest = default_learning_rate(sum(p.numel() for p in model.parameters()))
        rates = [highest / _LOWER**n for n in range(_TRIES)]  # r, r / 3, r / 9
    trained_masks = {trained_name(name, quantized): mask for name, mask in masks.items()}
    with (
        in_float32(model),
        on_grid(model, quantized),
        fixed_mask(model, trained_masks) as mask,
        evaluating(model),
    ):
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        key = _key(training, held_out, settings, parameters, f"{autocast} {teacher.key}")
        student = Student(model, parameters)
        if processes.count > 1:
            student = Student.sharded(model, parameters, mask, processes)
        loop = TrainingLoop(
            student=student,
            teacher=teacher,
            held_out=held_out,
            masters=_masters(quantized, mask.masks),
            autocast=autocast,
            steps=steps,
            rates=rates,
            state=state,
        )
        with recomputing(student.model, settings.activation_checkpointing):
            run = loop.train(key)
        student.put_back()
    result = Recovery(
        kl_before=run.curve[0][1],
        kl_after=run.best_kl,
        kept=f"after step {run.best_step}" if run.best_step else "before",
        stopped=run.stopped,
        tries=run.tries,
        steps=run.step,
        tokens=sum(step.tokens for step in steps[: run.step]),
        sequences=len(training),
        learning_rate=rates[run.tries],
        processes=processes.count,
        curve=tuple(run.curve),
        seconds=time.monotonic() - started,
    )
    logger.info(
        f"recovery: KL {result.kl_before:.4f} -> {result.kl_after:.4f} nats per held-out token "
        f"({result.kept}; {result.steps} steps, {result.tokens:,} tokens, learning rate "
        f"{result.learning_rate:.2g}, {result.seconds:.0f} s)"
    )
    return result


def _masters(
    quantized: Mapping[str, QuantizedWeight], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masked master weights by trained parameter name."""
    masters = {}
    for module, weight in quantized.items():
        if (master := weight.master) is not None:
            name = trained_name(f"{module}.weight", quantized)
            masters[name] = master * masks[name].to(master.device) if name in masks else master
    return masters


def _key(
    training: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    settings: RecoverySettings,
    parameters: Mapping[str, torch.nn.Parameter],
    context: str,
) -> str:
    """Hash everything that the result depends on, without settings that do not change it."""
    changing = settings.model_dump_json(exclude={"folder", "activation_checkpointing"})
    names = map(name_of, (*training, *held_out))
    digest = hashlib.blake2b("".join((context, *names, changing)).encode(), digest_size=16)
    for name, parameter in parameters.items():
        digest.update(name.encode())
        # the weights themselves: another pruned model has the same names
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
