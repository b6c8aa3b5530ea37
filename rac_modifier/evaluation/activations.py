"""Which layers lose nothing when their inputs are rounded to 8 bits instead of 16.

The CPU kernels round x to integers of at most `LEVELS`, with a scale per token and block of
columns. config.json records the chosen layers (`rac_sparsity.int8_activations`) for the plugin.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from torch import Tensor

from rac_modifier.checkpoint.card import RUN_RECORD_NAME
from rac_modifier.checkpoint.gptq_awq import FORMATS as GPTQ_AWQ
from rac_modifier.errors import RacError
from rac_modifier.evaluation.tables import ResultTable
from rac_modifier.formats.grid import Grid
from rac_modifier.formats.quantization_config import CONFIG_FILE
from rac_modifier.formats.words import OF_VOCABULARY
from rac_modifier.kernels.choose import plan_checkpoint
from rac_modifier.kernels.cpu import MOST_GROUP, encoding_of
from rac_modifier.kernels.interface import EXPERT
from rac_modifier.measure.divergence import DenseReference
from rac_modifier.measure.teacher_forcing import TokenSequence, check_sequences
from rac_modifier.runtime.files import read_json
from rac_modifier.runtime.models import evaluating

LEVELS = {8: 127, 16: 127 * 256 + 127}  # the largest integer of x (csrc/gemm/kernel.h)
LIMIT = 0.1  # the share of a layer's own error that 8 bits may add in a run


@dataclass(frozen=True)
class IntegerLayer:
    """A layer that the CPU kernels multiply as integers, with weights W, pruned and rounded Q."""

    module: str
    block: int  # columns of x that share a scale
    own_error: float | None = None  # ||W x - Q x||^2 / ||W x||^2; None until it is measured
    error: float = float("nan")  # ||Q (x8 - x16)||^2 / ||Q x16||^2, x rounded to 8 and 16 bits

    def bits(self, limit: float) -> int:
        """Return 8 if the error of 8 bits is at most `limit` times the own error, else 16."""
        return 8 if self.own_error and self.error <= limit * self.own_error else 16


def layers_of(folder: Path, *, recorded: bool = True) -> list[IntegerLayer]:
    """Return the linear layers that the CPU kernels multiply as integers (RacError: none).

    Experts, heads and embeddings keep 16 bits. `recorded`: with the own errors of the run record.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise RacError(f"{folder}: no such folder; hf download ID --local-dir FOLDER makes one")
    report, rows = plan_checkpoint(folder)
    rounds = any(scheme.activations is not None for scheme in report.quantization)
    why = None
    if report.format in GPTQ_AWQ:
        why = f"the format {report.format} has no place for the choice"
    elif report.format == "dense" and rounds:
        why = "its activations are quantized already, and no kernel takes them"
    if why is not None:
        raise RacError(
            f"{folder}: {why}; give the folder of a packed int8 or int4 checkpoint, or of a dense "
            "W4A16 one"
        )
    blocks = {}
    for row in rows:
        layer = row.layer
        block = activation_block(layer.stored, layer.group, layer.columns, layer.word_bits)
        if block is not None and not _keeps_16_bits(row.module):
            blocks[row.module] = block
    if not blocks:
        raise RacError(
            f"{folder}: the kernels multiply none of its layers as integers, so that none may have "
            "activations of 8 bits; quantize linear layers to int8 or int4"
        )
    errors = _recorded_errors(folder, blocks) if recorded else {}
    return [IntegerLayer(name, block, errors.get(name)) for name, block in blocks.items()]


def _keeps_16_bits(name: str) -> bool:
    """Return whether a module is an expert, a head or an embedding."""
    return bool(EXPERT.search(name) or OF_VOCABULARY.search(name))


def layers_of_run(
    model: Any, grids: Mapping[str, Grid], own_errors: Mapping[str, float]
) -> list[IntegerLayer]:
    """Return the layers with own errors that the CPU kernels will multiply as integers.

    `grids`: of the quantized modules by name. Experts, heads and embeddings keep 16 bits.
    """
    layers = []
    for name, grid in grids.items():
        if name not in own_errors or grid.kind != "int" or _keeps_16_bits(name):
            continue
        columns = model.get_submodule(name).weight.shape[1]
        stored = torch.int8 if grid.bits == 8 else torch.int32
        block = activation_block(stored, grid.group_size or columns, columns, grid.bits)
        if block is not None:
            layers.append(IntegerLayer(name, block, own_errors[name]))
    return layers


def activation_block(
    stored: torch.dtype, group: int, columns: int, word_bits: int = 4
) -> int | None:
    """Return the columns of x that share a scale; None where the kernels multiply floats."""
    encoding = encoding_of(stored, group, columns, torch.bfloat16, word_bits)
    if isinstance(encoding, str) or encoding.dtype != torch.int8:
        return None
    return min(group, MOST_GROUP)


def _recorded_errors(folder: Path, names: Iterable[str]) -> dict[str, float]:
    path = folder / RUN_RECORD_NAME
    modules = (read_json(path) if path.is_file() else {}).get("modules") or []
    errors = {m["name"]: float(m["relative_error"]) for m in modules if "relative_error" in m}
    if missing := [name for name in names if name not in errors]:
        raise RacError(
            f"{folder}: {RUN_RECORD_NAME} has no error of {missing[0]} ({len(missing)} in all), "
            "and 8 bits are compared with it; name the model that was quantized (--dense MODEL)"
        )
    return errors


def choose_activations(
    model: Any,
    layers: Sequence[IntegerLayer],
    sequences: Sequence[TokenSequence],
    limit: float,
    dense: Any = None,
) -> dict[str, Any]:
    """Measure each layer, and the divergence with 8 bits where they lose nothing.

    Return the entry of the run record. `dense`: the model before pruning and rounding
    (`check_original`), for unknown own errors.
    """
    measured = measure_activations(model, layers, sequences, dense)
    reference = DenseReference(model, sequences)
    chosen = [layer for layer in measured if layer.bits(limit) == 8]
    with _hooks(model, chosen, lambda layer, _, x: (rounded(x, layer.block, 8).to(x.dtype),)):
        divergence = asdict(reference.divergence(model, label="8 bits"))
    names = ("sequences", "tokens", "kl", "kl_stderr", "agreement")
    return activations_entry(measured, limit) | {name: divergence[name] for name in names}


def choose_in_run(
    model: Any, layers: Sequence[IntegerLayer], sequences: Sequence[TokenSequence]
) -> dict[str, Any] | None:
    """Return the entry of the run record for the limit `LIMIT`; None where no layer gets 8 bits.

    A failure is logged and costs no run.
    """
    try:
        measured = measure_activations(model, layers, sequences) if layers else []
    except (RacError, RuntimeError) as error:
        logger.warning(f"activations keep 16 bits, 8 were not measured: {error}")
        return None
    eight = sum(layer.bits(LIMIT) == 8 for layer in measured)
    if not eight:
        return None
    logger.info(f"activations of 8 bits in {eight} of {len(measured)} layers, on a CPU")
    return activations_entry(measured, LIMIT)


def activations_entry(measured: Sequence[IntegerLayer], limit: float) -> dict[str, Any]:
    """Return the choice of bits as the run record has it."""
    rows = {
        x.module: {"error": x.error, "own_error": x.own_error, "bits": x.bits(limit)}
        for x in measured
    }
    return {"limit": limit, "layers": rows}


def activations_table(entry: Mapping[str, Any]) -> ResultTable:
    """Return a row per layer of what `choose_activations` returned, and a note on the choice."""
    rows = tuple(
        (name, f"{row['error']:.2e}", f"{row['own_error']:.2e}", str(row["bits"]))
        for name, row in entry["layers"].items()
    )
    chosen = sum(row["bits"] == 8 for row in entry["layers"].values())
    note = (
        f"{chosen} of {len(rows)} layers in 8 bits, where these add at most {entry['limit']:g} of "
        "the layer's own error (both relative squared errors of its output): KL "
        f"{entry['kl']:.2e} nats per token from the model with none, and the most likely token is "
        f"the same for {entry['agreement']:.2%} of {entry['tokens']:,}."
    )
    return ResultTable(("layer", "error of 8 bits", "own error", "bits"), rows, note)


@torch.no_grad()
def measure_activations(
    model: Any,
    layers: Sequence[IntegerLayer],
    sequences: Sequence[TokenSequence],
    dense: Any = None,
) -> list[IntegerLayer]:
    """Return the layers with their errors on all tokens of `sequences`, in float32."""
    sums = {layer.module: [0.0, 0.0, 0.0, 0.0] for layer in layers}
    originals: Mapping[str, Any] = {} if dense is None else dict(dense.named_modules())

    def add(layer: IntegerLayer, module: Any, x: Tensor) -> None:
        weight = module.weight.float()
        eight, sixteen = rounded(x, layer.block, 8), rounded(x, layer.block, 16)
        outputs = [F.linear(eight - sixteen, weight), F.linear(sixteen, weight)]
        if layer.own_error is None:
            original = originals[layer.module].weight.to(weight)
            outputs += [F.linear(x.float(), original - weight), F.linear(x.float(), original)]
        for i, output in enumerate(outputs):
            sums[layer.module][i] += float(output.square().sum(dtype=torch.float64))

    check_sequences(sequences, model)
    with _hooks(model, layers, add), evaluating(model):
        for ids, _ in sequences:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    measured = []
    for layer, (change, output, lost, original) in zip(layers, sums.values(), strict=True):
        error = change / output if output else 0.0
        if not 0 <= error < float("inf"):
            raise RacError(f"{layer.module}: activations are not finite; load the model in float32")
        if layer.own_error is None:
            layer = replace(layer, own_error=lost / original if original else 0.0)
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
    model: Any, layers: Iterable[IntegerLayer], call: Callable[[IntegerLayer, Any, Tensor], Any]
) -> Iterator[None]:
    modules: Mapping[str, Any] = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.module not in modules:
                raise RacError(
                    f"{layer.module}: quantized in the checkpoint, but no layer of the model as "
                    "transformers names them, so it cannot be measured"
                )

            def hook(module: Any, args: tuple[Tensor, ...], layer: IntegerLayer = layer) -> Any:
                return call(layer, module, args[0])

            stack.callback(modules[layer.module].register_forward_pre_hook(hook).remove)
        yield


def check_original(model: Any, dense: Any, layers: Sequence[IntegerLayer]) -> None:
    """Refuse a dense model against which the own errors of these layers cannot be measured."""
    modules, originals = dict(model.named_modules()), dict(dense.named_modules())
    for name in (layer.module for layer in layers if layer.module in modules):
        # a compressed layer has no weight yet
        shape = (modules[name].out_features, modules[name].in_features)
        original = originals.get(name)
        quantized = getattr(original, "quantization_scheme", None) is not None
        weight = getattr(original, "weight", None)
        if quantized or weight is None or weight.shape != shape:
            raise RacError(
                f"{name}: no layer {list(shape)} in the dense model; name what was quantized"
            )
    vectors = {name: p for name, p in dense.named_parameters() if p.dim() == 1}
    for name, vector in model.named_parameters():
        original = vectors.get(name, vector).to(vector.device).float()
        if not torch.allclose(vector.float(), original, rtol=0.02, atol=1e-5):
            raise RacError(
                f"{name}: differs from the dense model's, so that is another model, or its weights "
                "were rescaled before they were rounded (as by AWQ), and own errors cannot be "
                "measured; name the model that was quantized"
            )
