"""How long a grid takes on one device, estimated before it runs.

Two speeds of the device are measured in a second: B, bytes per second of a copy, and F, operations per second of a product (in
the dtype of the model, and in float32). All else is arithmetic. For a model of P parameters and W bytes,

    one token for each of c answers of n tokens     max((W + c n kv) / B, 2 P c / F) / E
        and in this process                         + 1 ms per layer, for launches
    T tokens of c answers at once                   T / c of these, with n half of the mean length
    a forward pass over T tokens                    2 P T / (F E)
    compressing with T tokens                       2 passes (two models), and the operations that compressing.py counts
    training on T tokens                            (2 + 6) P T / (F E): the dense model's states, then forward and backward
        through the linear layers alone             6 P T / (F E), by AutoRound

with kv the bytes of keys and values per token and E = 0.4, the share of the measured speed that such code reaches: an
assumption, as is the mean length of an answer, 0.3 of its cap. What is printed is therefore marked as estimated; the upper figure
is for answers that are all cut at their cap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rac_modifier.frontier.compressing import PASSES, Group, groups_of, moments, solving

REACHED = 0.4
MEAN_SHARE = 0.3
LAUNCH = 1e-3  # seconds per layer and step
START = 90.0  # seconds of a start of `vllm serve`
_COPIED = (
    1 << 27
)  # bytes: more than caches hold, and long enough that a wait for a busy core does not decide


@dataclass(frozen=True)
class ModelShape:
    """What decides how much a model computes and keeps.

    Attributes:
        parameters: of the whole model.
        groups: its linear layers without the head, those that read one input together.
        layers: transformer blocks.
        hidden: width of the residual stream.
        kv_bytes: of keys and values per token.
        itemsize: bytes of a weight.
        active: parameters that a token meets, of a mixture of experts; 0: all.
    """

    parameters: int
    groups: tuple[Group, ...]
    layers: int
    hidden: int
    kv_bytes: int
    itemsize: int = 2
    active: int = 0

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Of a transformers model; shapes suffice, weights are not read."""
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = getattr(config, "num_key_value_heads", None) or heads
        itemsize = (config.dtype or torch.float32).itemsize
        return cls(
            parameters=sum(
                weight.numel() for weight in {id(p): p for p in model.parameters()}.values()
            ),
            groups=groups_of(model.named_modules(), head),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_bytes=2 * config.num_hidden_layers * keys * width * itemsize,
            itemsize=itemsize,
        )

    @property
    def computing(self) -> int:
        """Parameters that each token is multiplied with."""
        return self.active or self.parameters

    @property
    def nbytes(self) -> int:
        """Of the dense weights."""
        return self.parameters * self.itemsize


@dataclass(frozen=True)
class Asked:
    """Questions to one model: `answers` in all, at most `cap` new tokens each, `at_once` in progress, `served` by vLLM."""

    name: str
    answers: int
    cap: int
    at_once: int
    served: bool


@dataclass(frozen=True)
class Plan:
    """What is to be run: `rows` compressed models beside the dense one, each asked `asked`, calibrated on `tokens` traces."""

    shape: ModelShape
    rows: int
    tokens: int
    traces: Asked
    asked: tuple[Asked, ...]
    served: bool
    """Whether a server is started per model."""
    recovered: int = 0
    """Tokens that all rows together are trained on."""
    autorounded: int = 0
    """Tokens that AutoRound passes through each layer, in all rows and iterations together."""


@dataclass(frozen=True)
class Speed:
    """Of a device: bytes per second of a copy, operations per second of a product in the model's dtype and in float32."""

    copied: float
    computed: float
    computed32: float

    @classmethod
    def measured(cls, dtype: torch.dtype) -> Speed:
        """Of the accelerator, or the CPU where there is none."""
        device, size = torch.device("cpu"), 1024  # side of the matrices
        if (accelerator := torch.accelerator.current_accelerator()) is not None:
            device, size = accelerator, 4096
        block, copy_of_it = torch.zeros(2, _COPIED, dtype=torch.uint8, device=device)
        copy = _seconds(lambda: copy_of_it.copy_(block), device)
        products = [
            torch.ones(size, size, dtype=each, device=device) for each in (dtype, torch.float32)
        ]
        computed, computed32 = (2 * size**3 / _seconds(lambda x=x: x @ x, device) for x in products)
        return cls(2 * block.numel() / copy, computed, computed32)


@dataclass(frozen=True)
class Step:
    """A part of the run, in seconds: expected, and at most."""

    name: str
    seconds: float
    most: float


def estimate(plan: Plan, speed: Speed) -> list[Step]:
    """The parts of a run and how long each takes, for all models together."""
    models = plan.rows + 1
    steps = [Step("traces", *_answering(plan.traces, plan.shape, speed))]
    compressing = plan.rows * _compressing(plan, speed)
    steps.append(Step(f"compress, {plan.rows} rows", compressing, compressing))
    for name, work in _training(plan).items():
        seconds = work / max(speed.computed, speed.computed32) / REACHED
        steps.append(Step(name, seconds, seconds))
    for asked in plan.asked:
        expected, most = _answering(asked, plan.shape, speed)
        steps.append(Step(f"{asked.name}, {models} models", models * expected, models * most))
    if plan.served:
        steps.append(Step("starts of vllm serve", models * START, models * START))
    return steps


def describe(steps: Sequence[Step]) -> str:
    """The estimate in lines, marked as such."""
    width = max(len(step.name) for step in steps)
    total, most = (
        sum(values) for values in zip(*((s.seconds, s.most) for s in steps), strict=True)
    )
    lines = [
        f"Estimated, not measured: {_time(total)}, or {_time(most)} if every answer is cut at its cap."
    ]
    lines += [f"  {s.name:{width}}  {_time(s.seconds)}, at most {_time(s.most)}" for s in steps]
    lines += [
        f"  Formula: max((weights + answers x length x kv) / bandwidth, 2 x parameters x answers / operations) / {REACHED:g} per",
        f"  token. Bandwidth and operations were measured now, {REACHED:g} and a mean length of {MEAN_SHARE:g} x cap assumed.",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """With a unit that suits it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _answering(asked: Asked, shape: ModelShape, speed: Speed) -> tuple[float, float]:
    """Seconds for one model's answers: expected, and at most."""
    at_once = min(asked.at_once, asked.answers)
    found = []
    for share in (MEAN_SHARE, 1.0):
        length = share * asked.cap
        read = (shape.nbytes + at_once * length / 2 * shape.kv_bytes) / speed.copied
        step = max(read, 2 * shape.computing * at_once / speed.computed) / REACHED
        if not asked.served:  # a batch goes on until its longest answer ends
            step, length = step + LAUNCH * shape.layers, asked.cap
        found.append(asked.answers / at_once * length * step)
    return found[0], found[1]


def _compressing(plan: Plan, speed: Speed) -> float:
    """Seconds for one row."""
    shape, rates = plan.shape, (speed.computed, speed.computed32)
    passes = PASSES * 2 * shape.computing * plan.tokens / speed.computed
    work = [
        moments(group, plan.tokens) + solving(group.columns, sum(group.rows))
        for group in shape.groups
    ]
    return (passes + sum(part.seconds(*rates) for part in work)) / REACHED


def _training(plan: Plan) -> dict[str, float]:
    """Operations of training, of all rows that do so."""
    linear = sum(group.weights * group.share for group in plan.shape.groups)
    found = {
        "recover": 8 * plan.shape.computing * plan.recovered,
        "AutoRound": 6 * linear * plan.autorounded,
    }
    return {name: work for name, work in found.items() if work}


def _seconds(work: Any, device: Any) -> float:
    """The fastest of a few runs."""
    times = []
    for _ in range(4):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: Any) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
