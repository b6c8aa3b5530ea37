"""The model card (README.md) of a compressed checkpoint, made from its run record and the license of its base model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rac_modifier.checkpoint.license import License
from rac_modifier.checkpoint.measured import divergence_sentence, is_number, number, with_measured

_FEW_BITS = re.compile(r"int[23]\b")  # in the text of a scheme; vLLM has no CPU kernel for them
# Counts of the calibration set that have words of their own, in this order.
_COUNTS = (
    ("tokens", "tokens in all"),
    ("trace_tokens", "of the model's own chain of thought"),
    ("prompt_tokens", "of prompts"),
    ("generic_tokens", "of generic text"),
)


def model_card(
    record: Mapping[str, Any], license: License | None = None, packed: bool = True
) -> str:
    """Markdown with front matter for a run record; what is not in the record is called "not recorded", never guessed.

    Args:
        record: the run record.
        license: of the base model.
        packed: the weights are packed; else stock loaders read them.
    """
    license = license or License()
    base = record.get("base_model")
    done = " and ".join(
        word
        for word, key in (("pruned", "pattern"), ("quantized", "quantization"))
        if record.get(key) is not None
    )
    done = done or "compressed"
    title = f"{base} {done}" if base else f"A {done} language model"
    parts = [
        _front_matter(record, license),
        f"# {title}",
        f"{done.capitalize()} after training with reasoning-aware compression (RAC, arXiv 2509.12464): the output of each "
        "linear layer on the calibration tokens is kept as closely as possible. The table below counts these tokens by kind.",
        f"## How it was {done}",
        _facts(record, license),
        _layers(record),
        "## What is measured",
        divergence_sentence(
            record.get("divergence"),
            "that the base model generated and that were not used for calibration",
        ),
        "Reconstruction errors are measured on the calibration tokens. Accuracy, thinking length and speed are **not** "
        "measured during compression: before use, evaluate this model and its base model at the same token limit.",
        how_to_use(packed, record.get("quantization") or ()),
        versions(record),
    ]
    return with_measured("\n\n".join(part for part in parts if part) + "\n", record)


def how_to_use(packed: bool, schemes: Iterable[str] = ()) -> str:
    """The sections of a card that have the commands for loading and serving. `schemes`: the record's, of quantized weights."""
    few = sorted(
        {found[0] for scheme in schemes if not packed and (found := _FEW_BITS.search(scheme))}
    )
    first = (
        "import rac_modifier  # lets transformers read packed sparse weights\n" if packed else ""
    )
    load = (
        f"```python\n{first}from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")\n```'
    )
    if packed:
        load += (
            "\n\n`rac_modifier.load_model` does the same, and raises an error where transformers only warns of missing weights."
            " `rac unpack` writes an ordinary dense checkpoint, which needs no rac_modifier."
        )
    option = " --quantization rac" if few else ""
    serve = f"```bash\nvllm serve path/to/this/folder{option}\n```\n\n"
    if packed:
        serve += "rac_modifier must be installed beside vLLM: its plugin reads the packed weights. `rac inspect` shows which "
        serve += "layers run on sparse kernels."
    elif few:
        serve += f"rac_modifier must be installed beside vLLM, which has no kernel for {' or '.join(few)} weights on a CPU."
    else:
        serve += "The weights are stored dense, so stock vLLM serves them."
    return f"## Load\n\n{load}\n\n## Serve\n\n{serve}"


def _front_matter(record: Mapping[str, Any], license: License) -> str:
    tags = ["quantized"] if record.get("quantization") else []
    tags += ["pruned", "sparse"] if record.get("pattern") or not tags else []
    return card_data(
        record.get("base_model"),
        license,
        [*tags, "reasoning", "rac", "llm-compressor", "compressed-tensors"],
    )


def card_data(base: Any, license: License, tags: list[str], **others: Any) -> str:
    """The front matter, checked by huggingface_hub; `others` are further entries."""
    fixed: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    data = ModelCardData(
        **{**fixed, **others},
        base_model=_hub_id(base),
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_id(base: Any) -> str | None:
    """The base model, if its name can be that of a model of the hub: the hub refuses a card with any other."""
    try:
        validate_repo_id(str(base or ""))
    except HFValidationError:
        return None
    return str(base)


def _facts(record: Mapping[str, Any], license: License) -> str:
    calibration = record.get("calibration")
    stores = record.get("trace_stores")
    rows = [
        ("Base model", record.get("base_model")),
        ("License", license.describe()),
        *([("Pattern", record.get("pattern"))] if _is_pruned(record) else []),
        *(
            [("Quantization", "; ".join(map(str, schemes)))]
            if (schemes := record.get("quantization"))
            else []
        ),
        ("Solver", record.get("method")),
        ("Calibration", _calibration(calibration) if isinstance(calibration, Mapping) else None),
    ]
    for name, store in stores.items() if isinstance(stores, Mapping) else ():
        if isinstance(store, Mapping):
            rows.append((str(name).capitalize(), _store(store)))
    rows.append(("Seed", record.get("seed", _modifier_seed(record))))
    if record.get("recipe") is not None:
        rows.append(("Recipe", record["recipe"]))
    return fact_table(rows)


def fact_table(rows: Sequence[tuple[str, Any]]) -> str:
    """A table with a name and a value per row; None is "not recorded"."""
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"| | |\n|---|---|\n{table}"


def _store(store: Mapping[str, Any]) -> str:
    text = f"`{store.get('path', 'unrecorded path')}`, sha256 `{store.get('sha256', 'unrecorded')}`"
    selection = store.get("selection")
    if isinstance(selection, Mapping) and selection.get("kept") != selection.get("of"):
        text += f", {number(selection.get('kept'))} of its {number(selection.get('of'))} traces selected"
    return text


def _calibration(counts: Mapping[str, Any]) -> str:
    known = [f"{number(counts[key])} {words}" for key, words in _COUNTS if key in counts]
    named = {"parts", *(key for key, _ in _COUNTS)}
    known += [
        f"{number(value)} {key.replace('_', ' ')}"
        for key, value in counts.items()
        if key not in named
    ]
    parts = counts.get("parts")
    if isinstance(parts, Mapping) and len(parts) > 1:
        tokens = (
            f"{name} {number(part.get('tokens'))}"
            for name, part in parts.items()
            if isinstance(part, Mapping)
        )
        known.append(f"by part: {', '.join(tokens)} tokens")
    return "; ".join(known)


def _modifier_seed(record: Mapping[str, Any]) -> Any:
    modifier = record.get("modifier")
    return modifier.get("seed") if isinstance(modifier, Mapping) else None


def _layers(record: Mapping[str, Any]) -> str:
    """How many modules, and the five with the largest errors; all of them are in the record."""
    modules = [module for module in record.get("modules") or () if isinstance(module, Mapping)]
    if not modules:
        return ""
    text = f"{len(modules)} linear modules were {'pruned' if _is_pruned(record) else 'quantized (errors are after rounding)'}"
    quantized = sum(1 for module in modules if module.get("quantization"))
    if quantized and _is_pruned(record):
        text += f", {quantized} of them quantized in the same pass (errors are after rounding)"
    sparsities = [module["sparsity"] for module in modules if is_number(module.get("sparsity"))]
    if sparsities:
        text += f", each to a sparsity of {min(sparsities):.4f} to {max(sparsities):.4f}"
    text += "."
    raised = sum(1 for module in modules if module.get("retries"))
    if raised:
        text += f" The dampening had to be raised for {raised} of them."
    measured = [module for module in modules if is_number(module.get("relative_error"))]
    worst = sorted(measured, key=lambda module: -module["relative_error"])[:5]
    if worst:
        rows = "\n".join(
            f"| `{module.get('name', '?')}` | {module['relative_error']:.4g} |" for module in worst
        )
        text += "\n\nLargest relative errors of the outputs on the calibration tokens:\n\n"
        text += f"| module | error |\n|---|---|\n{rows}"
    return text + "\n\nAll modules are in `rac_run.json`."


def _is_pruned(record: Mapping[str, Any]) -> bool:
    """Whether weights were pruned, which an old record may not say."""
    return record.get("pattern") is not None or not record.get("quantization")


def versions(record: Mapping[str, Any]) -> str:
    """The line with the versions that a model was made with."""
    found = record.get("versions")
    if not isinstance(found, Mapping):
        return ""
    return (
        "Made with "
        + ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
        + "."
    )


def _cell(value: Any) -> str:
    if value is None:
        return "not recorded"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")
