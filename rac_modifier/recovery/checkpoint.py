"""Recover a saved checkpoint: `rac recover`, with the stage that a recipe trains in.

Where answers of the compressed model end in copies, it is trained on these copies too.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import align_module_device
from loguru import logger
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from rac_modifier.checkpoint.card import RUN_RECORD_NAME
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.pack_plan import MOST_ZEROS_24
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import choose_in_run
from rac_modifier.formats.quantization_config import (
    COMPRESSED_TENSORS,
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityRecord,
    weight_schemes,
)
from rac_modifier.measure.repeats import end_of_copies
from rac_modifier.measure.teacher_forcing import TokenSequence
from rac_modifier.pruning.masks import holds
from rac_modifier.recovery import trained_codes
from rac_modifier.recovery.fixed_mask import LEAST_ZEROS, masks_of_zeros, sparse_masks
from rac_modifier.recovery.stage import RecoveryStage
from rac_modifier.recovery.teacher import check_dense, check_made_from
from rac_modifier.runtime.files import read_json, write_text_atomic
from rac_modifier.runtime.models import on_accelerator
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.recovery import RecoverySettings
from rac_modifier.settings.sampling import PromptSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import TraceStore

Load = Callable[[str], tuple[Any, Any]]  # a model and its tokenizer
_2OF4 = Pattern.n_of_m(2, 4)


def recover_checkpoint(
    dense: str,
    sparse: Path,
    output: Path,
    settings: RecoverySettings,
    traces: TraceSettings,
    processes: Processes,
    load: Load,
    linearize: Callable[[Any], Any],
) -> tuple[float, float] | None:
    """Train the checkpoint `sparse` towards the model `dense`, and save it to `output` (RacError).

    Missing `traces` are sampled. A machine without `sparse` gets it from the first machine.
    `linearize` gives the experts of a model layers of their own. Return the held-out KL before and
    after; None on ranks other than the first.
    """
    here = (sparse / CONFIG_FILE).is_file()
    lacks = processes.from_first(here) and not here and processes.rank == processes.machine
    processes.copy(sparse, sparse, needed=lacks)
    stored = _quantized_modules(sparse)
    model, tokenizer = load(dense)
    check_dense(model, dense)
    pruned, _ = load(str(sparse))
    models = {"dense model": model_fingerprint(model), "sparse model": model_fingerprint(pruned)}
    asked = settings.model_dump(mode="json", exclude={"folder"})
    processes.check_same({**models, "settings": asked})
    trained_codes.check_layers(pruned, stored)
    check_made_from(pruned, model)
    for loaded in (model, pruned):  # as `oneshot` does
        linearize(loaded)
    structures = SparsityRecord.of(pruned.config.to_dict()).modules
    checkpoint = trained_codes.QuantizedCheckpoint(pruned, model, structures)
    modules, patterns = _sparse_modules(pruned, checkpoint.quantized, checkpoint.pruned)
    quantizes = bool(checkpoint.quantized)
    stage = RecoveryStage(model, settings, processes, quantizes=quantizes, keep=True)
    path = sparse / RUN_RECORD_NAME
    before = read_json(path) if path.is_file() else {}
    stores = before.get("trace_stores") or {}
    rows = (before.get("activations") or {}).get("layers", {})
    errors = {name: float(row["own_error"]) for name, row in rows.items()}
    collected = None
    fresh: list[Trace] = []
    if processes.is_first:
        hashes = {str(entry.get("sha256")) for entry in stores.values()}
        tokens = settings.reserved_tokens
        collected, fresh = collect_unused(model, tokenizer, traces, tokens, hashes)
    fresh = [Trace.of(sent) for sent in processes.from_first([asdict(trace) for trace in fresh])]

    def own(training: Sequence[TokenSequence], kept: Path) -> list[TokenSequence]:
        assert collected is not None  # the first process samples
        with on_accelerator(pruned):
            return copying_answers(pruned, tokenizer, training, collected.header.sampling, kept)

    stage.read_dense(model, fresh, own)
    del model
    recovery = stage.run(pruned, modules, checkpoint.quantized)
    if collected is None:
        return None

    grids = {name: quantized.grid for name, quantized in checkpoint.quantized.items()}
    with on_accelerator(pruned):
        activations = choose_in_run(pruned, grids, errors, stage.held_out)

    name = "recovery" if "recovery" not in stores else f"recovery {len(stores)}"
    header = collected.header
    about = {"path": str(collected.path), "sha256": collected.sha256(), "model": header.model}
    prompt = PromptSettings.of(header.sampling).model_dump()
    record = {
        "method": "recover",
        "recovered_from": str(sparse),
        "recovery": recovery,
        "trace_stores": {**stores, name: about},
        "prompts": before.get("prompts") or {"recovery": prompt},
    }
    if patterns:  # none for a model that is quantized alone
        first = next(iter(patterns.values()))
        described = f"{first.describe()} (of the first module)"
        record |= {"pattern": described, "mask_structure": first.mask_structure}
    plan = SavePlan(
        record=record,
        patterns=patterns,
        modules=modules,
        storage="packed" if checkpoint.packs else "dense",
        prepare=lambda *_: checkpoint.encode(),
        activations=activations,
        after=[stage.remove],
    )
    pruned.config._name_or_path = dense
    save_with_record(pruned, lambda: plan)
    try:
        tokenizer.save_pretrained(output)
        pruned.save_pretrained(output)  # last: an output with a card is complete
    except (OSError, SafetensorError, RacError) as error:
        if not (output / CONFIG_FILE).exists():  # else another run has saved there meanwhile
            shutil.rmtree(output, ignore_errors=True)
        raise RacError(
            f"{output}: the recovered model cannot be written ({error}); what was trained is kept "
            f"in {stage.folder}: make room, and run the same command again"
        ) from error
    return recovery["kl_before"], recovery["kl_after"]


def collect_unused(
    model: Any, tokenizer: Any, settings: TraceSettings, tokens: int, hashes: Collection[str]
) -> tuple[TraceStore, list[Trace]]:
    """Return a store of the dense model, and `tokens` tokens that no run of `hashes` used."""
    budget, missing, used = tokens, 1, 0
    with on_accelerator(model):
        while missing > 0:
            again = budget > tokens
            store = collect_traces(model, tokenizer, settings, budget, again=again)
            used = store.used(hashes)
            fresh = store.fresh(used, tokens)
            missing = tokens - sum(trace.without_repeats().tokens for trace in fresh)
            budget = store.counts.tokens + missing
    if used:
        logger.info(f"{store.path}: its first {used:,} traces were used before; others are taken")
    return store, fresh


def _quantized_modules(sparse: Path) -> set[str]:
    """Return the names of the quantized modules (RacError: another format's)."""
    if not sparse.is_dir():
        return set()
    quantization = read_json(sparse / CONFIG_FILE).get(QUANTIZATION_KEY) or {}
    if (method := quantization.get("quant_method", COMPRESSED_TENSORS)) != COMPRESSED_TENSORS:
        raise RacError(
            f"{sparse}: quantized by {method!r}; recovery reads and writes {COMPRESSED_TENSORS} "
            "alone: quantize with llm-compressor"
        )
    if not weight_schemes(quantization):
        return set()
    with TensorFiles(sparse) as files:
        return trained_codes.quantized_names(files.where)


def patterns_of_zeros(
    names: Mapping[torch.nn.Module, str], required: Pattern | None, *, detect: bool
) -> tuple[dict[str, Pattern], str]:
    """Return the pattern of each module that `solver: keep` keeps, and all in words (RacError).

    That is `required`, with `detect` 2:4 if every module holds it without many more zeros, or the
    share of zeros of each.
    """
    shares: dict[str, Pattern] = {}
    zeros, total, structured = 0, 0, detect
    for module, name in names.items():
        with align_module_device(module):
            weight = module.get_parameter("weight")
            count = weight.numel() - int(weight.count_nonzero())
            held = required is None or holds(weight, required)
            few = count <= MOST_ZEROS_24 * weight.numel()  # 3:4 holds 2:4 too
            structured = structured and few and weight.shape[1] % 4 == 0 and holds(weight, _2OF4)
        if not held or not LEAST_ZEROS <= count / weight.numel() < 1:
            lacking = f"{count:,} of its {weight.numel():,} weights are zero"
            raise RacError(
                f"{name}: solver: keep keeps a model's zeros, and this module lacks them "
                f"({required.describe() if required else lacking}); leave solver out to prune it, "
                "or add it to ignore"
            )
        shares[name] = Pattern.unstructured(count / weight.numel())
        zeros, total = zeros + count, total + weight.numel()
    pattern = required or (_2OF4 if structured else None)
    if pattern is not None:
        return dict.fromkeys(shares, pattern), pattern.describe()
    return shares, f"the zeros that the model had, {100 * zeros / total:.4g} % of the weights"


def _sparse_modules(
    model: torch.nn.Module, quantized: Collection[str], pruned: Collection[str]
) -> tuple[dict[str, torch.nn.Linear], dict[str, Pattern]]:
    """Return the linear layers of a sparse model by name, `quantized` if `pruned`, and patterns."""
    masks = masks_of_zeros(model) if quantized else sparse_masks(model)
    sparse = {mask.removesuffix(".weight") for mask in masks} - (set(quantized) - set(pruned))
    linears = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    modules = {name: module for name, module in linears if name in sparse}
    names: dict[torch.nn.Module, str] = {module: name for name, module in modules.items()}
    return modules, patterns_of_zeros(names, None, detect=True)[0] if names else {}


_LEAST = 0.1  # share of the answers that end in copies, below which none is trained on
_LONGEST = 2  # cap of an answer: times the mean completion of the training traces


def copying_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    training: Sequence[TokenSequence],
    sampling: SamplingSettings,
    path: Path,
) -> list[TokenSequence]:
    """Answer training prompts greedily; return the answers that end in copies, cut behind a few.

    Where fewer than a tenth end so, none is returned, and no further batch is asked for. What is
    returned is kept in `path`, and not sampled again for the same model and prompts.
    """
    prompts = list(dict.fromkeys(tuple(ids[:prompt]) for ids, prompt in training))
    completed = sum(len(ids) - prompt for ids, prompt in training)
    cap = min(sampling.max_new_tokens, _LONGEST * completed // len(training))
    about = {"model": model_fingerprint(model), "cap": cap, "prompts": list(map(list, prompts))}
    kept = read_json(path) if path.exists() else {}
    if about.items() <= kept.items():
        return [(tuple(ids), prompt) for ids, prompt in kept["answers"]]
    greedy = sampling.model_copy(
        update={"temperature": 0.0, "max_new_tokens": cap, "samples_per_problem": 1}
    )
    answers = _copying(model, tokenizer, prompts, greedy)
    write_text_atomic(path, json.dumps({**about, "answers": answers}))
    return answers


def _copying(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    greedy: SamplingSettings,
) -> list[TokenSequence]:
    """Answer batches of prompts until all are answered, or fewer than a tenth end in copies."""
    answers: list[TokenSequence] = []
    asked, seldom = 0, False
    while not seldom and asked < len(prompts):
        batch = [list(ids) for ids in prompts[asked : asked + greedy.batch_size]]
        keys = [str(asked + row) for row in range(len(batch))]
        asked += len(batch)
        generations = generate(model, tokenizer, batch, greedy, keys)
        for prompt, answer in zip(batch, generations, strict=True):
            # an answer that ended by itself has left its copies
            end = end_of_copies(answer.ids) if answer.finish_reason == "length" else None
            if end is not None:
                answers.append(((*prompt, *answer.ids[:end]), len(prompt)))
        # a model that seldom copies is not worth the sampling
        seldom = len(answers) < _LEAST * asked
    logger.info(
        f"{len(answers)} of {asked} greedy answers of the compressed model end in copies within "
        f"{greedy.max_new_tokens:,} tokens; recovery trains on "
        f"{'none of these' if seldom else 'these too'}"
    )
    return [] if seldom else answers
