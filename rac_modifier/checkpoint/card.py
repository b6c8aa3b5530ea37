"""The README of a pruned checkpoint, made of its run record and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Counts of the calibration set that are worth a line, in this order.
_COUNTS = (
    ("tokens", "tokens in all"),
    ("trace_tokens", "of the model's own chain of thought"),
    ("prompt_tokens", "of prompts"),
    ("generic_tokens", "of generic text"),
)


def model_card(record: Mapping[str, Any]) -> str:
    """Markdown with front matter for a run record; what the record lacks is said to be unrecorded, not guessed."""
    base = record.get("base_model")
    done = " and ".join(
        word for word, key in (("pruned", "pattern"), ("quantized", "quantization")) if record.get(key) is not None
    )
    done = done or "compressed"
    title = f"{base} {done}" if base else f"A {done} language model"
    parts = [
        _front_matter(record),
        f"# {title}",
        f"{done.capitalize()} after training with reasoning-aware compression (RAC, arXiv 2509.12464): each linear layer "
        "keeps its output on the calibration tokens, which the table below counts by kind.",
        f"## How it was {done}",
        _facts(record),
        _layers(record),
        "## What is measured",
        _divergence(record),
        "Reconstruction errors are measured on the calibration tokens. Accuracy, thinking length and speed are **not** "
        "measured by compressing: evaluate this model next to its base model, at the same token limit, before use.",
        "## Load",
        "```python\nfrom rac_modifier import load_model\n\n"
        'model = load_model("path/to/this/folder", dtype="auto", device_map="auto")\n```',
        _versions(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: Mapping[str, Any]) -> str:
    lines = ["---"]
    if record.get("base_model"):
        lines.append(f"base_model: {json.dumps(str(record['base_model']))}")  # a JSON string is a YAML string
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    tags = ["quantized"] if record.get("quantization") else []
    tags += ["pruned", "sparse"] if record.get("pattern") or not tags else []
    lines += [f"- {tag}" for tag in (*tags, "reasoning", "rac", "llm-compressor", "compressed-tensors")]
    return "\n".join([*lines, "---"])


def _facts(record: Mapping[str, Any]) -> str:
    calibration = record.get("calibration")
    stores = record.get("trace_stores")
    rows = [
        ("Base model", record.get("base_model")),
        ("Pattern", record.get("pattern")),
        *([("Quantization", "; ".join(map(str, schemes)))] if (schemes := record.get("quantization")) else []),
        ("Solver", record.get("method")),
        ("Calibration", _calibration(calibration) if isinstance(calibration, Mapping) else None),
    ]
    for name, store in stores.items() if isinstance(stores, Mapping) else ():
        if isinstance(store, Mapping):
            rows.append((str(name).capitalize(), _store(store)))
    rows.append(("Seed", record.get("seed", _modifier_seed(record))))
    if record.get("recipe") is not None:
        rows.append(("Recipe", record["recipe"]))
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"| | |\n|---|---|\n{table}"


def _store(store: Mapping[str, Any]) -> str:
    text = f"`{store.get('path', 'unrecorded path')}`, sha256 `{store.get('sha256', 'unrecorded')}`"
    selection = store.get("selection")
    if isinstance(selection, Mapping) and selection.get("kept") != selection.get("of"):
        text += f", {_number(selection.get('kept'))} of its {_number(selection.get('of'))} traces selected"
    return text


def _calibration(counts: Mapping[str, Any]) -> str:
    known = [f"{_number(counts[key])} {words}" for key, words in _COUNTS if key in counts]
    named = {"parts", *(key for key, _ in _COUNTS)}
    known += [f"{_number(value)} {key.replace('_', ' ')}" for key, value in counts.items() if key not in named]
    parts = counts.get("parts")
    if isinstance(parts, Mapping) and len(parts) > 1:
        tokens = (f"{name} {_number(part.get('tokens'))}" for name, part in parts.items() if isinstance(part, Mapping))
        known.append(f"by part: {', '.join(tokens)} tokens")
    return "; ".join(known)


def _modifier_seed(record: Mapping[str, Any]) -> Any:
    modifier = record.get("modifier")
    return modifier.get("seed") if isinstance(modifier, Mapping) else None


def _layers(record: Mapping[str, Any]) -> str:
    """How many modules, and the worst of them: nobody reads a card of hundreds of rows, and the record has them all."""
    modules = [module for module in record.get("modules") or () if isinstance(module, Mapping)]
    if not modules:
        return ""
    text = f"{len(modules)} linear modules were pruned"
    quantized = sum(1 for module in modules if module.get("quantization"))
    if quantized:
        text += f", {quantized} of them quantized in the same pass (errors are after rounding)"
    sparsities = [module["sparsity"] for module in modules if _is_number(module.get("sparsity"))]
    if sparsities:
        text += f", each to a sparsity of {min(sparsities):.4f} to {max(sparsities):.4f}"
    text += "."
    raised = sum(1 for module in modules if module.get("retries"))
    if raised:
        text += f" The dampening had to be raised for {raised} of them."
    measured = [module for module in modules if _is_number(module.get("relative_error"))]
    worst = sorted(measured, key=lambda module: -module["relative_error"])[:5]
    if worst:
        rows = "\n".join(f"| `{module.get('name', '?')}` | {module['relative_error']:.4g} |" for module in worst)
        text += "\n\nLargest relative errors of the outputs on the calibration tokens:\n\n"
        text += f"| module | error |\n|---|---|\n{rows}"
    return text + "\n\nAll modules are in `rac_run.json`."


def _divergence(record: Mapping[str, Any]) -> str:
    """How far its predictions are from the base model's, where the run measured it."""
    found = record.get("divergence")
    if not isinstance(found, Mapping) or not (_is_number(found.get("kl")) and _is_number(found.get("agreement"))):
        return ""
    return (
        f"On {_number(found.get('tokens', '?'))} tokens that the base model wrote itself and that were not calibrated on, the "
        f"predictions are {found['kl']:.4f} nats a token (KL) from the base model's, and the most likely token is the same for "
        f"{found['agreement']:.1%} of them."
    )


def _versions(record: Mapping[str, Any]) -> str:
    versions = record.get("versions")
    if not isinstance(versions, Mapping):
        return ""
    return "Made with " + ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None) + "."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:,}" if _is_number(value) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "not recorded"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
