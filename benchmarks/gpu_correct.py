"""Are the GPU kernels right on this machine's GPU? Used by gpu_kernels.py and tests/kernels/cuda/test_on_gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gpu_budget import Budget
from gpu_formats import FORMATS, Linear, packed_linear, random_weight
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels import cuda
from rac_modifier.kernels.cuda import cusparselt, library
from rac_modifier.kernels.cuda.backend import DATA, LAYOUT, PROMPTS
from rac_modifier.kernels.cuda.layout import ALL
from rac_modifier.kernels.cuda.operator import run_program
from rac_modifier.kernels.cuda.programs import Program, all_programs, expand_program, most_tokens

TOKENS = (1, 3, 8, 9, 16, 17, 32, 33, 128, 257)
PROGRAMS_SHAPE = (200, 4104)  # parts of 16 to 128 rows, and each ring goes round more than once
ODD_SHAPES = ((16, 128), (37, 200), (70, 1032), (4096, 4096))
PROMPTS_SHAPE = (272, 1024)  # for cuSPARSELt, which wants multiples of 16
PROMPTS_TOKENS = (257, 2048)  # and multiples of 8, to which they are padded
# By which share of the time programs of a layout, which are compiled then, and products of a weight must have begun.
PROGRAMS_BY, CHECKED_BY = 0.5, 0.35


class NotCapturedError(RacError):
    """Why a product cannot be part of a CUDA graph."""


@contextmanager
def exact_sums() -> Iterator[None]:
    """Has cuBLAS sum bfloat16 products in fp32 meanwhile, which the bound of `error_of` takes for granted."""
    setting = torch.backends.cuda.matmul
    before = setting.allow_bf16_reduced_precision_reduction
    setting.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        setting.allow_bf16_reduced_precision_reduction = before


def error_of(
    what: str,
    linear: Linear,
    x: Tensor,
    dense: Tensor,
    bias: Tensor,
    expanded: bool,
    variable: str = cuda.VARIABLE,
) -> float:
    """The largest error of a product over what sums in fp32 and one rounding allow. 1 is the bound.

    `dense`: the weight in float64. `expanded`: its scaled values are rounded to bfloat16 first. `variable`: asks for the product.

    Raises:
        RacError: a wrong result, or other bits the second time.
    """
    with exact_sums():
        y, again = linear(x), linear(x)
    terms = x.double().abs() @ dense.abs().T + bias.double().abs()
    exact = x.double() @ dense.T + bias.double()
    bound = terms * 2.0**-19 + exact.abs() * 2.0**-8 + (2.0**-8 * terms if expanded else 0.0)
    error = float(((y.double() - exact).abs() / bound).max())
    if not error <= 1.0:
        raise RacError(
            f"{what}: wrong by {error:.3g} times the bound; do not set {variable}, and report this"
        )
    if not torch.equal(again, y):
        raise RacError(
            f"{what}: other bits the second time; do not set {variable}, and report this"
        )
    return error


def check_programs(
    device: str, rows: int, columns: int, budget: Budget
) -> Iterator[dict[str, object]]:
    """One row per program, also of those that the operator would not choose for this weight on this card.

    Raises:
        RacError: a wrong result, or other bits the second time.
    """
    for name, kind in FORMATS.items():
        if not budget.allows(f"every program of {name}", PROGRAMS_BY):
            continue
        weight = random_weight(rows, columns, *kind)
        dense, bias = (
            weight.dequantized(torch.float64).to(device),
            torch.randn(rows).bfloat16().to(device),
        )
        packed = cuda.pack(weight, torch.bfloat16)
        layout, here = ALL[packed[LAYOUT].shape[1]], library.current_device()
        assert here is not None  # something was packed for it
        for program in all_programs(layout):
            expands = program == expand_program(layout)
            tokens = (
                most_tokens(layout) + 1 if expands else 8 * program.token_tiles + 5
            )  # a second block, partly filled

            def run(x: Tensor, program: Program = program, expands: bool = expands) -> Tensor:
                if expands:
                    return cuda.linear(x, packed, rows, weight.columns, bias)  # noqa: B023
                out = x.new_empty(len(x), rows)
                run_program(here, layout, program, x, packed[DATA], bias, out)  # noqa: B023
                return out

            x = torch.randn(tokens, weight.columns).bfloat16().to(device)
            what = (
                f"program {program.name} of {name} [{rows}, {weight.columns}] times {tokens} tokens"
            )
            error = error_of(what, run, x, dense, bias, expands and weight.scale is not None)
            yield {"format": name, "program": program.name, "tokens": tokens, "error": error}


def check(
    device: str, shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], budget: Budget
) -> Iterator[dict[str, object]]:
    """One row per product, on the programs that the operator chooses.

    Raises:
        RacError: a wrong result, or other bits the second time.
    """
    for rows, columns in shapes:
        for name, kind in FORMATS.items():
            if not budget.allows(f"products of {name} [{rows}, {columns}]", CHECKED_BY):
                continue
            weight = random_weight(rows, columns, *kind)
            dense, bias = (
                weight.dequantized(torch.float64).to(device),
                torch.randn(rows).bfloat16().to(device),
            )
            linear = packed_linear(weight, bias)
            for number in tokens:
                x = torch.randn(number, weight.columns).bfloat16().to(device)
                what = f"{name} [{rows}, {weight.columns}] times {number} tokens"
                error = error_of(
                    what, linear, x, dense, bias, weight.scale is not None and number > 128
                )
                yield {
                    "format": name,
                    "rows": rows,
                    "columns": weight.columns,
                    "tokens": number,
                    "error": error,
                }


def check_prompts(
    device: str, budget: Budget, missing: dict[str, str]
) -> Iterator[dict[str, object]]:
    """One row per product of a 2:4 weight on cuSPARSELt, as RAC_GPU_PROMPTS=cusparselt has it where that is faster.

    Why cuSPARSELt is not here, or not in CUDA graphs, is added to `missing`.

    Raises:
        RacError: a wrong result, or other bits the second time or out of a graph.
    """
    what = "prompts by cuSPARSELt"
    if not torch.backends.cusparselt.is_available():
        missing[what] = f"torch {torch.__version__} has none"
        return
    rows, columns = PROMPTS_SHAPE
    for name, kind in FORMATS.items():
        if not kind[2] or not budget.allows(f"{what} of {name}", PROGRAMS_BY):
            continue
        weight = random_weight(rows, columns, *kind)
        dense, bias = (
            weight.dequantized(torch.float64).to(device),
            torch.randn(rows).bfloat16().to(device),
        )
        packed = cuda.pack(weight, torch.bfloat16)
        try:
            packed[PROMPTS] = cusparselt.compress(
                weight.dequantized(torch.bfloat16), torch.device(device)
            )
        except RacError as error:
            missing[what] = str(error)
            return

        def run(x: Tensor, packed: dict[str, Tensor] = packed, bias: Tensor = bias) -> Tensor:
            return cuda.linear(x, packed, rows, columns, bias)

        for number in PROMPTS_TOKENS:
            x = torch.randn(number, columns).bfloat16().to(device)
            named = f"{what}, {name} [{rows}, {columns}] times {number} tokens"
            error = error_of(
                named, run, x, dense, bias, weight.scale is not None, cusparselt.VARIABLE
            )
            yield {"format": name, "tokens": number, "error": error}
        x = torch.zeros(512, columns, dtype=torch.bfloat16, device=device)
        try:
            check_graph(f"{what} of {name}", run, x)
        except NotCapturedError as error:
            missing[f"{what} in a captured graph"] = str(error)


def check_streams(device: str) -> None:
    """A product on a stream that is not the default one has the bits of one on the default one."""
    linear, x = packed_linear(random_weight(64, 256)), torch.randn(4, 256, device=device).bfloat16()
    expected = linear(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = linear(x)
    torch.cuda.synchronize()
    if not torch.equal(found, expected):
        raise RacError(
            "a product on another stream is another one; do not set RAC_GPU_KERNELS, and report this"
        )


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches, after a run outside of it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def check_graphs(device: str) -> None:
    """A replayed product has the bits of a launched one, for other activations in the same memory."""
    for name, kind in FORMATS.items():
        linear = packed_linear(random_weight(272, 512, *kind))
        for tokens in (1, 16, 32, 64, 300):
            check_graph(name, linear, torch.zeros(tokens, 512, dtype=torch.bfloat16, device=device))


def check_graph(what: str, linear: Linear, x: Tensor) -> None:
    """The same for one product; `x` is written.

    Raises:
        NotCapturedError: it cannot be captured.
        RacError: a graph of another product.
    """
    kept = [torch.empty(0)]

    def step() -> None:
        kept[0] = linear(x)

    try:
        graph = captured(step)
    except (RuntimeError, RacError) as error:
        raise NotCapturedError(f"{what}: {str(error).splitlines()[0]}") from error
    x.copy_(torch.randn(x.shape))
    graph.replay()
    if not torch.equal(kept[0], linear(x)):
        raise RacError(
            f"{what}, {len(x)} tokens: a captured graph computes something else; report this"
        )
