"""`rac recover`: train the weights of a checkpoint towards its dense model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.models import check_model, check_output, load, resolve
from rac_modifier.cli.options import AsJson, Dtype, Precision, print_json, resumable, saving_step
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.recovery import RecoverySettings
    from rac_modifier.settings.sampling import SamplingSettings
    from rac_modifier.traces.store import TraceStore


def recover(
    dense: Annotated[
        str, typer.Argument(help='the dense model: a folder, a Hugging Face id, or "reasoner"')
    ],
    sparse: Annotated[
        Path,
        typer.Argument(help="folder of the sparse or quantized checkpoint that was made from it"),
    ],
    output: Annotated[
        Path, typer.Argument(help="folder for the recovered checkpoint; new or empty")
    ],
    store: Annotated[
        Path | None,
        typer.Option(
            "--traces",
            help="trace store of the dense model; what calibration used is left out, missing "
            "traces are sampled",
        ),
    ] = None,
    problems: Annotated[
        str | None,
        typer.Option(
            help="problems to sample on: a file, a dataset id, reasoning-gym:TASK, arithmetic "
            "(default; or the store's)"
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="column of the problems' text")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="cap of a sampled completion; default: the store's, or 8192"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="a setting of `recover:` in a recipe, e.g. --set tokens=200000 (repeatable)",
        ),
    ] = None,
    precision: Precision = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Recover a sparse or quantized model: train its kept weights on the dense model's own traces.

    No pruned weight moves, and quantized weights are trained through their codes. The weights with
    the lowest divergence on held-out traces are kept, perhaps those before training. A run that was
    killed continues when it is started again.

    Example: rac recover reasoner reasoner-90 recovered --max-new-tokens 512 --set tokens=80000
    """
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.recipe import apply_overrides
    from rac_modifier.settings.recovery import RecoverySettings

    entry: dict[str, Any] = {}
    apply_overrides(entry, set_ or [])
    settings = check_settings(RecoverySettings, entry, "--set")
    sources = _asked(store, problems, column, max_new_tokens)
    check_model(resolve(dense))
    check_model(resolve(str(sparse)))
    check_output(output, str(sparse))
    job = _Job(dense, sparse, output, settings, precision)
    # llm-compressor logs to the standard output that it finds when it is imported
    quiet = redirect_stdout(sys.stderr) if as_json else nullcontext()
    results = "the traces, and training up to its last state,"
    with quiet, resumable(lambda: saving_step(output, results)):
        from rac_modifier.processes import joined_processes

        with joined_processes() as processes:
            divergence = job.run(processes, store, *sources)
            processes.wait()
    if divergence is None:  # the first process says so
        return
    before, after = divergence
    if as_json:
        print_json({"output": output, "kl_before": before, "kl_after": after})
    else:
        typer.echo(f"saved to {output}; held-out KL {before:.4f} -> {after:.4f} nats per token")


def _asked(
    store: Path | None, problems: str | None, column: str | None, max_new_tokens: int | None
) -> tuple[ProblemSource, SamplingSettings]:
    """Return problems and sampling: the store's, where there is one, with the options' changes."""
    from loguru import logger

    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import SamplingSettings
    from rac_modifier.traces.store import TraceStore

    # another seed than calibration's default gives other traces
    source, sampling = ProblemSource(), SamplingSettings(seed=1)
    if store is not None and store.is_file():
        header = TraceStore.read(store).header
        source, sampling = header.problems, header.sampling
    elif store is not None:
        logger.warning(
            f"there is no trace store at {store} yet: all traces are sampled, and kept there"
        )
    if problems is not None or column is not None:
        source = ProblemSource(source=problems or source.source, column=column)
    if max_new_tokens is not None:
        sampling = sampling.model_copy(update={"max_new_tokens": max_new_tokens})
    return source, sampling


@dataclass(frozen=True)
class _Job:
    """What is recovered, where to, and how."""

    dense: str
    sparse: Path
    output: Path
    settings: RecoverySettings
    precision: Dtype

    def run(
        self, processes: Any, store_path: Path | None, problems: Any, sampling: Any
    ) -> tuple[float, float] | None:
        """Recover and save; return held-out KL before and after, None on the other processes."""
        import torch

        from rac_modifier.checkpoint.quantization_config import SparsityRecord
        from rac_modifier.checkpoint.saving import SavePlan, save_with_record
        from rac_modifier.llmcompressor.recovery_stage import RecoveryStage, before_sampling
        from rac_modifier.llmcompressor.targets import sparse_modules
        from rac_modifier.llmcompressor.trained_codes import QuantizedCheckpoint, check_layers
        from rac_modifier.recovery.teacher import check_dense, check_made_from
        from rac_modifier.traces.selection import fresh_traces, used_traces

        stored = _quantized_modules(self.sparse)
        model, tokenizer = load(self.dense, self.precision)
        check_dense(model, self.dense)
        pruned, _ = load(str(self.sparse), self.precision)
        check_layers(pruned, stored)
        check_made_from(pruned, model)
        structures = SparsityRecord.of(pruned.config.to_dict()).modules
        checkpoint = QuantizedCheckpoint(pruned, model, structures)
        modules, patterns = sparse_modules(pruned, checkpoint.quantized, checkpoint.pruned)
        run = processes, bool(checkpoint.quantized)
        text = before_sampling(model, lambda: tokenizer, self.settings, *run)
        record = _record_of(self.sparse)
        hashes = {str(entry.get("sha256")) for entry in _stores_of(record).values()}
        tokens = self.settings.reserved_tokens
        store = _collected(
            processes, model, tokenizer, store_path, problems, sampling, tokens, hashes
        )
        traces = fresh_traces(store, used_traces(store, hashes), tokens)
        stage = RecoveryStage(model, traces, self.settings, True, *run, generic=text)
        del model
        recovery = stage.run(pruned, modules, checkpoint.quantized)
        if not processes.is_first:
            return None
        linears = {name: m for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
        plan = SavePlan(
            record=self._record(record, store, patterns, recovery),
            patterns=patterns,
            modules=linears,
            storage="packed" if checkpoint.packs else "dense",
            tokenizer=resolve(self.dense),
            prepare=lambda *_: checkpoint.encode(),
            after=[stage.remove],
        )
        pruned.config._name_or_path = resolve(self.dense)
        save_with_record(pruned, lambda: plan)
        self._write(pruned, tokenizer, stage.folder)
        return recovery["kl_before"], recovery["kl_after"]

    def _record(
        self,
        before: dict[str, Any],
        store: TraceStore,
        patterns: Mapping[str, Any],
        recovery: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the run record: stores and prompts of the runs `before`, and what recovery did."""
        from rac_modifier.settings.sampling import PromptSettings

        stores = _stores_of(before)
        name = "recovery" if "recovery" not in stores else f"recovery {len(stores)}"
        header = store.header
        stores[name] = {"path": str(store.path), "sha256": store.sha256(), "model": header.model}
        prompt = PromptSettings.of(header.sampling).model_dump()
        record = {
            "method": "recover",
            "recovered_from": str(self.sparse),
            "recovery": recovery,
            "trace_stores": stores,
            "prompts": before.get("prompts") or {"recovery": prompt},
        }
        if patterns:  # none for a model that is quantized alone
            first = next(iter(patterns.values()))
            described = f"{first.describe()} (of the first module)"
            record |= {"pattern": described, "mask_structure": first.mask_structure}
        return record

    def _write(self, recovered: Any, tokenizer: Any, trained: Path) -> None:
        """Write the checkpoint; a failure keeps the weights in `trained` (RacError)."""
        from safetensors import SafetensorError

        try:
            tokenizer.save_pretrained(self.output)
            recovered.save_pretrained(self.output)  # last: an output with a card is complete
        except (OSError, SafetensorError, RacError) as error:
            shutil.rmtree(self.output, ignore_errors=True)  # it was new or empty
            raise RacError(
                f"{self.output}: the recovered model cannot be written ({error}); what was trained "
                f"is kept in {trained}: make room, and run the same command again, which does not "
                "train again"
            ) from error


def _stores_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the trace stores of a run record, by part."""
    stores = (record.get("trace_stores") or {}).items()
    return {name: dict(entry) for name, entry in stores if isinstance(entry, dict)}


def _collected(
    processes: Any,
    model: Any,
    tokenizer: Any,
    path: Path | None,
    problems: Any,
    sampling: Any,
    tokens: int,
    hashes: Collection[str],
) -> TraceStore:
    """Return a store of the dense model with `tokens` tokens that no run of `hashes` used."""
    from loguru import logger

    from rac_modifier.model_tools import on_accelerator
    from rac_modifier.sampling.engine import end_sampling, help_sampling
    from rac_modifier.traces.collect import collect_traces
    from rac_modifier.traces.selection import fresh_traces, used_traces
    from rac_modifier.traces.store import TraceStore

    if not processes.is_first:
        return TraceStore.read(help_sampling(model, tokenizer, processes))
    arguments = {"problems": problems, "sampling": sampling, "processes": processes}
    budget, missing, used = tokens, 1, 0
    with on_accelerator(model):
        while missing > 0:
            store = collect_traces(model, tokenizer, path, tokens=budget, **arguments)
            used = used_traces(store, hashes)
            missing = tokens - sum(trace.tokens for trace in fresh_traces(store, used, tokens))
            budget = store.counts.tokens + missing
    if used:
        logger.info(f"{store.path}: its first {used:,} traces were used before; others are taken")
    end_sampling(processes, str(store.path))
    return store


def _record_of(sparse: Path) -> dict[str, Any]:
    """Return the run record of the checkpoint; empty where it has none."""
    from rac_modifier.checkpoint.record import RUN_RECORD_NAME
    from rac_modifier.files import read_json

    path = sparse / RUN_RECORD_NAME
    return dict(read_json(path)) if path.is_file() else {}


def _quantized_modules(sparse: Path) -> set[str]:
    """Return the names of the quantized modules (RacError: some cannot be trained)."""
    from rac_modifier.checkpoint.files import TensorFiles
    from rac_modifier.checkpoint.quantization_config import (
        CONFIG_FILE,
        METHOD,
        QUANTIZATION_KEY,
        RAC_METHOD,
        weight_schemes,
    )
    from rac_modifier.files import read_json
    from rac_modifier.llmcompressor.trained_codes import check_trainable, quantized_names

    if not sparse.is_dir():
        return set()
    quantization = read_json(sparse / CONFIG_FILE).get(QUANTIZATION_KEY) or {}
    if (method := quantization.get("quant_method", METHOD)) not in (METHOD, RAC_METHOD):
        raise RacError(
            f"{sparse}: quantized by {method!r}; recovery reads and writes {METHOD} alone: "
            "quantize with llm-compressor"
        )
    if not weight_schemes(quantization):
        return set()
    with TensorFiles(sparse) as files:
        check_trainable(files.where, str(sparse))
        return quantized_names(files.where)
