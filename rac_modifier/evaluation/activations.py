"""Which layers lose nothing when their inputs are rounded to 8 bits instead of 16.

The CPU kernels round x to integers of at most `LEVELS`, with a scale per token and block of
columns. config.json records the chosen layers (`rac_sparsity.int8_activations`) for the plugin.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.module_names import Role
from rac_modifier.kernels.cpu import MOST_GROUP, packed_type
from rac_modifier.kernels.interface import Layer
from rac_modifier.measure.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.runtime.models import evaluating
from rac_modifier.runtime.progress import Phase

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/gemm/kernel.h)
_ROUNDED = (Role.LINEAR, Role.ROUTER)  # experts, heads and embeddings keep 16 bits
LIMIT = 0.1  # the share of a layer's own error that 8 bits may add in a run


@dataclass(frozen=True)
class _IntegerLayer:
    """A layer that the CPU kernels multiply as integers, with weights W, pruned and rounded Q."""

    module: str
    block: int  # columns of x that share a scale
    own_error: float  # ||W x - Q x||^2 / ||W x||^2
    error: float = float("nan")  # ||Q (x8 - x16)||^2 / ||Q x16||^2, x rounded to 8 and 16 bits

    def bits(self, limit: float) -> int:
        """Return 8 if the error of 8 bits is at most `limit` times the own error, else 16."""
        return 8 if self.own_error and self.error <= limit * self.own_error else 16


def _layers_of_run(
    model: Any, grids: Mapping[str, Encoding], own_errors: Mapping[str, float]
) -> list[_IntegerLayer]:
    """Return the layers with own errors that the CPU kernels will multiply as integers.

    `grids`: of the quantized modules by name. Experts, heads and embeddings keep 16 bits.
    """
    layers = []
    for name, grid in grids.items():
        if name not in own_errors or grid.kind != "int" or Role.of(name) not in _ROUNDED:
            continue
        block = _activation_block(grid, model.get_submodule(name).weight.shape[1])
        if block is not None:
            layers.append(_IntegerLayer(name, block, own_errors[name]))
    return layers


def _activation_block(encoding: Encoding, columns: int) -> int | None:
    """Return the columns of x that share a scale; None where the kernels multiply floats."""
    layer = Layer(1, columns, 1.0, encoding, torch.bfloat16)
    form = packed_type(layer)
    if isinstance(form, str) or form[0].dtype != torch.int8:
        return None
    return min(layer.group, MOST_GROUP)


def choose_in_run(
    model: Any,
    grids: Mapping[str, Encoding],
    own_errors: Mapping[str, float],
    sequences: Sequence[TokenSequence],
) -> dict[str, Any] | None:
    """Return the entry of the run record for the limit `LIMIT`; None where no layer gets 8 bits.

    `grids` and `own_errors` are by module. A failure is logged and costs no run.
    """
    layers = _layers_of_run(model, grids, own_errors)
    try:
        measured = _measure_activations(model, layers, sequences) if layers else []
    except (RacError, RuntimeError) as error:
        logger.warning(f"activations keep 16 bits, 8 were not measured: {error}")
        return None
    eight = sum(layer.bits(LIMIT) == 8 for layer in measured)
    if not eight:
        return None
    logger.info(f"activations of 8 bits in {eight} of {len(measured)} layers, on a CPU")
    rows = {
        x.module: {"error": x.error, "own_error": x.own_error, "bits": x.bits(LIMIT)}
        for x in measured
    }
    return {"limit": LIMIT, "layers": rows}


@torch.no_grad()
def _measure_activations(
    model: Any, layers: Sequence[_IntegerLayer], sequences: Sequence[TokenSequence]
) -> list[_IntegerLayer]:
    """Return the layers with their errors on all tokens of `sequences`, in float32."""
    sums = {layer.module: [0.0, 0.0] for layer in layers}

    def add(layer: _IntegerLayer, module: Any, x: Tensor) -> None:
        weight = module.weight.float()
        eight, sixteen = rounded(x, layer.block, 8), rounded(x, layer.block, 16)
        outputs = [F.linear(eight - sixteen, weight), F.linear(sixteen, weight)]
        for i, output in enumerate(outputs):
            sums[layer.module][i] += float(output.square().sum(dtype=torch.float64))

    check_sequences(sequences, model)
    phase = Phase("8-bit activations on held-out traces", len(sequences), unit="traces")
    with phase, _hooks(model, layers, add), evaluating(model):
        for ids, _ in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
            phase.advance()
    measured = []
    for layer, (change, output) in zip(layers, sums.values(), strict=True):
        error = change / output if output else 0.0
        if not 0 <= error < float("inf"):
            raise RacError(f"{layer.module}: activations are not finite; load the model in float32")
        measured.append(replace(layer, error=error))
    return measured


def rounded(x: Tensor, block: int, bits: int) -> Tensor:
    """Round X [..., K] as the kernels do, to integers of `bits` times a scale per row and block."""
    columns, levels = x.shape[-1], LEVELS[bits]
    blocks = F.pad(x.float(), (0, -columns % block)).unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    numbers = torch.where(largest >= 1e-30, blocks * (levels / largest), 0.0)
    integers = torch.trunc(numbers + torch.where(numbers < 0, -0.5, 0.5))
    return (integers * (largest / levels)).flatten(-2)[..., :columns]


@contextlib.contextmanager
def _hooks(
    model: Any, layers: Iterable[_IntegerLayer], call: Callable[[_IntegerLayer, Any, Tensor], Any]
) -> Iterator[None]:
    modules: Mapping[str, Any] = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.module not in modules:
                raise RacError(
                    f"{layer.module}: quantized in the checkpoint, but no layer of the model as "
                    "transformers names them, so it cannot be measured"
                )

            def hook(module: Any, args: tuple[Tensor, ...], layer: _IntegerLayer = layer) -> Any:
                return call(layer, module, args[0])

            stack.callback(modules[layer.module].register_forward_pre_hook(hook).remove)
        yield
