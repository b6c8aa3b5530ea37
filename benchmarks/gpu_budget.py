"""How long `make gpu-check` may take, and how long it is expected to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from gpu_formats import FORMATS, TIMED_FORMATS, random_weight

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import layout as layouts
from rac_modifier.kernels.cuda import nvrtc
from rac_modifier.kernels.cuda.library import compile_options
from rac_modifier.kernels.cuda.programs import all_programs
from rac_modifier.kernels.cuda.sources import read_sources

_SAMPLE = (512, 4096)  # rows and columns of the weights that a plan makes


class Budget:
    """Seconds of a run from now on. `left_out` names what there was no time for; `shares` False: only the whole time counts."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now, self.start = seconds, now, now()
        self.shares = True
        self.left_out: list[str] = []

    def left(self, share: float = 1.0) -> float:
        """Seconds until this share of the time is over, at least 1."""
        return max(1.0, self.start + (share if self.shares else 1.0) * self.seconds - self.now())

    def allows(self, what: str, share: float = 1.0) -> bool:
        """Whether `what` may begin: this share of the time is not over. Otherwise it is left out."""
        if self.now() - self.start < (share if self.shares else 1.0) * self.seconds:
            return True
        self.leave_out(what)
        return False

    def leave_out(self, what: str) -> None:
        """Name what does not run."""
        self.left_out.append(what)


def plan(
    programs_shape: tuple[int, int],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    layers: Mapping[str, tuple[int, int]],
    timed: Sequence[int],
    rounds: int,
) -> Iterator[str]:
    """What a run has to do, and how long its parts on the CPU take here."""
    kernels = [len(all_programs(layout)) for layout in layouts.ALL]
    weights = sum(rows * columns for rows, columns in (programs_shape, *shapes))
    products = len(shapes) * len(FORMATS) * len(tokens)
    yield (
        f"checks: {sum(kernels)} programs and {products:,} products of {weights / 1e6:.0f} million weights in each of "
        f"{len(FORMATS)} formats, each twice"
    )
    to_time = sum(rows * columns for rows, columns in layers.values())
    steps = len(layers) * len(timed) * rounds
    yield f"times: {to_time / 1e6:.0f} million weights in each of {len(TIMED_FORMATS)} formats; {steps} rounds of all contenders"
    each = {
        name: _seconds_to_make(kind) / (_SAMPLE[0] * _SAMPLE[1]) for name, kind in FORMATS.items()
    }
    making = sum(each.values()) * weights + sum(each[name] for name in TIMED_FORMATS) * to_time
    slowest = max(each, key=each.__getitem__)
    yield (
        f"making and packing weights: {making:.0f} s here with {torch.get_num_threads()} threads, by a sample of "
        f"[{_SAMPLE[0]}, {_SAMPLE[1]}] of each format; most for {slowest}, {1e9 * each[slowest]:.0f} ns per weight"
    )
    yield f"compiling {sum(kernels)} kernels of {len(kernels)} layouts: {_compiling(kernels)}"
    yield "not in it: what the GPU does, compute-sanitizer, and the served model"


def _seconds_to_make(kind: tuple[int, int, bool, bool, bool]) -> float:
    bits, _, two_of_four, *_ = kind
    start = time.perf_counter()
    weight = random_weight(*_SAMPLE, *kind)
    stored = torch.int32 if bits == 4 else weight.values.dtype
    layout = layouts.layout_of(
        stored, weight.group, weight.columns, two_of_four, weight.group_bytes
    )
    assert layout is not None
    layouts.pack(weight, layout)
    return time.perf_counter() - start


def _compiling(kernels: Sequence[int]) -> str:
    try:
        compiler = nvrtc.load()
    except RacError as error:
        return f"not known here ({error})"
    layout = layouts.BF16
    start = time.perf_counter()
    compiler.build(read_sources(), layout.source, compile_options("sm_90", layout))
    taken = time.perf_counter() - start
    all_of_them = taken / len(all_programs(layout)) * sum(kernels)
    return f"{all_of_them:.0f} s here, by those of {layout.title} for sm_90, {taken:.1f} s; once"
