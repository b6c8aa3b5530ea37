"""Model cards (README.md) of compressed and packed checkpoints, made from the run record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rac_modifier.checkpoint.record import (
    LICENSE_KEYS,
    RUN_RECORD_NAME,
    card_text,
    divergence,
    license_of,
    split_card,
    with_measured,
)
from rac_modifier.errors import RacError

_FEW_BITS = re.compile(r"int[23]\b")  # in the text of a scheme; vLLM has no CPU kernel for them
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Counts of the calibration set that have words of their own, in this order.
_COUNTS = {
    "tokens": "tokens in all",
    "trace_tokens": "of the model's own chain of thought",
    "prompt_tokens": "of prompts",
    "generic_tokens": "of generic text",
}
_PACKED_TAGS = ("sparse", "compressed-tensors", "rac")
_BASE_CARD = "## Card of the base model"
# Entries of an earlier card that are made anew.
_REPLACED = ("base_model", *LICENSE_KEYS, "tags", "model-index")


def model_card(
    record: Mapping[str, Any], license: Mapping[str, str] | None = None, packed: bool = True
) -> str:
    """Return the card of a run; what is not in the record is called "not recorded".

    `license` is the base model's (`license_of`). Not `packed`: stock loaders read the weights.
    """
    try:
        return _of_run(record, license or {"license": "unknown"}, packed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RacError(
            f"{RUN_RECORD_NAME}: is malformed ({error!r}); restore the file, or remove it"
        ) from error


def packed_card(record: Mapping[str, Any], source: Path) -> str:
    """Return the card of a packed model; of a model that was pruned here, its run's card.

    The record of others has the figures of `packing`; the card of `source` is appended.
    """
    license, packing = license_of(source), record.get("packing")
    if not isinstance(packing, Mapping):
        return model_card(record, license)
    base, card = record.get("base_model"), card_text(source)
    zeros = "with 0.0 instead of -0.0" if packing["negative_zeros"] == "dropped" else "bit for bit"
    before = split_card(card)[1]
    sections = [
        _metadata(base, license, _PACKED_TAGS, card),
        f"# {base}, packed",
        "The zeros of its weights are not stored. Loaded, its weights are those of the base "
        f"model, {zeros}. `{RUN_RECORD_NAME}` has the patterns and bytes.",
        _how_to_use(packed=True),
        _versions(record),
        f"{_BASE_CARD}\n\n{before}" if before else "",
    ]
    return _joined(sections, record)


def unpacked_card(record: Mapping[str, Any], source: Path) -> str:
    """Return the card of an unpacked model: its run's card, or the one before packing."""
    license = license_of(source)
    if not isinstance(record.get("packing"), Mapping):
        return model_card(record, license, packed=False)
    base, card = record.get("base_model"), card_text(source)
    body = card.partition(f"\n{_BASE_CARD}\n")[2].strip() or f"# {base}"
    return _joined([_metadata(base, license, ["sparse"], card), body], record)


def _of_run(record: Mapping[str, Any], license: Mapping[str, str], packed: bool) -> str:
    base, pattern, schemes = (record.get(key) for key in ("base_model", "pattern", "quantization"))
    is_pruned = pattern is not None or not schemes  # an old record has no pattern
    words = ["pruned"] * (pattern is not None) + ["quantized"] * bool(schemes)
    verb = " and ".join(words) or "compressed"
    tags = ["quantized"] * bool(schemes) + ["pruned", "sparse"] * is_pruned
    tags += ["reasoning", "rac", "llm-compressor", "compressed-tensors"]
    counts, seed = record.get("calibration"), (record.get("modifier") or {}).get("seed")
    rows = {"Base model": base, "License": license.get("license_name") or license["license"]}
    if is_pruned:
        rows["Pattern"] = pattern
    if schemes:
        rows["Quantization"] = "; ".join(schemes)
    rows["Solver"] = record.get("method")
    rows["Calibration"] = _calibration(counts) if counts else None
    for name, store in (record.get("trace_stores") or {}).items():
        rows[name.capitalize()] = _store(store)
    rows["Seed"] = record.get("seed", seed)
    if record.get("recipe") is not None:
        rows["Recipe"] = record["recipe"]
    sections = [
        _metadata(base, license, tags),
        f"# {base} {verb}" if base else f"# A {verb} language model",
        f"{verb.capitalize()} after training with reasoning-aware compression (RAC, arXiv "
        "2509.12464): the output of each linear layer on the calibration tokens is kept as "
        "closely as possible. The table below counts these tokens by kind.",
        f"## How it was {verb}",
        _table(rows),
        _layers(record.get("modules"), is_pruned),
        "## What is measured",
        divergence(
            record.get("divergence") or {},
            "that the base model generated and that were not used for calibration",
        ),
        "Reconstruction errors are measured on the calibration tokens. Accuracy, thinking "
        "length and speed are **not** measured during compression: before use, evaluate "
        "this model and its base model at the same token limit.",
        _how_to_use(packed, schemes or ()),
        _versions(record),
    ]
    return _joined(sections, record)


def _joined(sections: Iterable[str], record: Mapping[str, Any]) -> str:
    return with_measured("\n\n".join(section for section in sections if section) + "\n", record)


def _how_to_use(packed: bool, schemes: Iterable[str] = ()) -> str:
    """Return the sections with the commands for loading and serving."""
    few_bits = sorted({bits[0] for scheme in schemes if (bits := _FEW_BITS.search(scheme))})
    first = option = more = ""
    serve = "The weights are stored dense, so stock vLLM serves them."
    if packed:
        first = "import rac_modifier  # lets transformers read packed sparse weights\n"
        more = (
            "\n\n`rac_modifier.load_model` does the same for a causal language model. "
            "`rac unpack` writes an ordinary dense checkpoint, which needs no rac_modifier."
        )
        serve = (
            "rac_modifier must be installed next to vLLM: its plugin reads the packed weights. "
            "`rac inspect` shows which layers run on sparse kernels."
        )
    elif few_bits:
        option = " --quantization rac"
        serve = (
            "rac_modifier must be installed next to vLLM, which has no kernel for "
            f"{' or '.join(few_bits)} weights on a CPU."
        )
    return (
        f"## Load\n\n```python\n{first}from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", '
        f'device_map="auto")\n```{more}\n\n'
        f"## Serve\n\n```bash\nvllm serve path/to/this/folder{option}\n```\n\n{serve}"
    )


def _metadata(base: object, license: Mapping[str, str], tags: Sequence[str], card: str = "") -> str:
    """Return the front matter; an earlier card gives other entries."""
    earlier, _ = split_card(card)
    earlier_tags = earlier.get("tags") if isinstance(earlier.get("tags"), list) else []
    foreign = [tag for tag in map(str, earlier_tags or []) if tag not in _PACKED_TAGS]
    entries = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    entries |= {key: value for key, value in earlier.items() if key not in _REPLACED}
    if _HUB_ID.fullmatch(str(base or "")):  # the hub refuses others
        entries["base_model"] = str(base)
    data = {**entries, **license, "tags": list(dict.fromkeys([*foreign, *tags]))}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---"


def _table(rows: Mapping[str, Any]) -> str:
    """Return a table with a name and a value per row; None is "not recorded"."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        text = "not recorded" if value is None else str(value).replace("|", "\\|")
        lines.append(f"| {name} | {' '.join(text.split())} |")
    return "\n".join(lines)


def _store(store: Mapping[str, Any]) -> str:
    text = f"`{store.get('path')}`, sha256 `{store.get('sha256')}`"
    selection = store.get("selection") or {}
    if selection.get("kept") != selection.get("of"):
        text += f", {selection['kept']:,} of its {selection['of']:,} traces selected"
    return text


def _calibration(counts: Mapping[str, Any]) -> str:
    """Describe the calibration set by its counts of tokens."""
    words = _COUNTS | {key: key.replace("_", " ") for key in counts if key not in _COUNTS}
    part_counts = counts.get("parts") or {}
    text = [f"{counts[key]:,} {words[key]}" for key in words if key in counts and key != "parts"]
    if len(part_counts) > 1:
        tokens = (f"{name} {part['tokens']:,}" for name, part in part_counts.items())
        text.append(f"by part: {', '.join(tokens)} tokens")
    return "; ".join(text)


def _layers(modules: Sequence[Mapping[str, Any]] | None, is_pruned: bool) -> str:
    """Count the modules, and name the five with the largest errors."""
    if not modules:
        return ""
    text = f"{len(modules)} linear modules were {'pruned' if is_pruned else 'quantized'}"
    if sparsities := [module["sparsity"] for module in modules if "sparsity" in module]:
        text += f", each to a sparsity of {min(sparsities):.4f} to {max(sparsities):.4f}"
    text += f". All are in `{RUN_RECORD_NAME}`."
    measured = [module for module in modules if module.get("relative_error") is not None]
    if worst := sorted(measured, key=lambda module: -module["relative_error"])[:5]:
        rows = (f"| `{row['name']}` | {row['relative_error']:.4g} |" for row in worst)
        text += " The largest relative errors of outputs on the calibration tokens:\n\n"
        text += "\n".join(["| module | error |\n|---|---|", *rows])
    return text


def _versions(record: Mapping[str, Any]) -> str:
    versions = record.get("versions") or {}
    shown = (f"{name} {value}" for name, value in versions.items() if value is not None)
    return f"Made with {', '.join(shown)}." if versions else ""
