"""Model cards (README.md) of compressed and packed checkpoints, made from the run record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rac_modifier.checkpoint.measured import divergence_sentence, is_number, number, with_measured
from rac_modifier.checkpoint.record import CARD_NAME, License, front_matter, license_of

_FEW_BITS = re.compile(r"int[23]\b")  # in the text of a scheme; vLLM has no CPU kernel for them
# Counts of the calibration set that have words of their own, in this order.
_COUNTS = {
    "tokens": "tokens in all",
    "trace_tokens": "of the model's own chain of thought",
    "prompt_tokens": "of prompts",
    "generic_tokens": "of generic text",
}
_PACKED_TAGS = ("sparse", "compressed-tensors", "rac")
_BEFORE = "## Card of the base model"
# Entries of an earlier card that are made anew.
_OURS = (
    *("base_model", "license", "license_name", "license_link", "tags"),
    *("model-index", "model_name", "eval_results"),
)


def model_card(
    record: Mapping[str, Any], license: License | None = None, packed: bool = True
) -> str:
    """Return the card of a run; what is not in the record is called "not recorded", never guessed.

    Args:
        record: the run record.
        license: of the base model.
        packed: the weights are packed; else stock loaders read them.
    """
    license = license or License()
    base, pattern, schemes = (record.get(key) for key in ("base_model", "pattern", "quantization"))
    verb = " and ".join(
        word for word, value in (("pruned", pattern), ("quantized", schemes)) if value is not None
    )
    verb = verb or "compressed"
    tags = ["quantized"] if schemes else []
    tags += ["pruned", "sparse"] if pattern or not tags else []
    tags += ["reasoning", "rac", "llm-compressor", "compressed-tensors"]
    sections = [
        _metadata(base, license, tags),
        f"# {base} {verb}" if base else f"# A {verb} language model",
        f"{verb.capitalize()} after training with reasoning-aware compression (RAC, arXiv "
        "2509.12464): the output of each linear layer on the calibration tokens is kept as "
        "closely as possible. The table below counts these tokens by kind.",
        f"## How it was {verb}",
        _table(_facts(record, license)),
        _layers(record),
        "## What is measured",
        divergence_sentence(
            record.get("divergence"),
            "that the base model generated and that were not used for calibration",
        ),
        "Reconstruction errors are measured on the calibration tokens. Accuracy, thinking "
        "length and speed are **not** measured during compression: before use, evaluate "
        "this model and its base model at the same token limit.",
        _how_to_use(packed, schemes or ()),
        _versions(record),
    ]
    return _joined(sections, record)


def packed_card(record: Mapping[str, Any], source: Path) -> str:
    """Return the card of a packed model; of a model that was pruned here, that of its run.

    Args:
        record: the run record; without a run of this package, it has the figures of `packing`.
        source: the folder that was packed, whose own card, if any, is appended.
    """
    license, packing = license_of(source), record.get("packing")
    if not isinstance(packing, Mapping):
        return model_card(record, license)
    before, base = _card_of(source), record.get("base_model")
    zeros = "0.0 instead of -0.0" if packing.get("negative_zeros") == "dropped" else None
    same = (
        f"those of the base model, with {zeros}."
        if zeros
        else "those of the base model, bit for bit."
    )
    patterns = (f"{count} modules {name}" for name, count in packing["modules"].items())
    sizes = f"{packing['packed_bytes']:,} bytes, {packing['dense_bytes']:,} stored dense"
    rows = {
        "Base model": base,
        "License": license.describe(),
        "Patterns": ", ".join(patterns),
        "Zeros in the packed modules": f"{packing['sparsity']:.2%}",
        "Weights of these modules": sizes,
    }
    sections = [
        _metadata(base, license, _PACKED_TAGS, before),
        f"# {base or 'A sparse language model'}, packed",
        f"The zeros of its weights are not stored. Loaded, its weights are {same}",
        _table(rows.items()),
        _how_to_use(packed=True),
        _versions(record),
        f"{_BEFORE}\n\n{_body(before)}" if _body(before) else "",
    ]
    return _joined(sections, record)


def unpacked_card(record: Mapping[str, Any], source: Path) -> str:
    """Return the card of an unpacked model: that of its run, or the one before packing."""
    license = license_of(source)
    if not isinstance(record.get("packing"), Mapping):
        return model_card(record, license, packed=False)
    packed, base = _card_of(source), record.get("base_model")
    body = packed.partition(f"\n{_BEFORE}\n")[2].strip() or f"# {base or 'A sparse language model'}"
    return _joined([_metadata(base, license, ["sparse"], packed), body], record)


def _joined(sections: Iterable[str], record: Mapping[str, Any]) -> str:
    return with_measured("\n\n".join(section for section in sections if section) + "\n", record)


def _how_to_use(packed: bool, schemes: Iterable[str] = ()) -> str:
    """Return the sections with the commands for loading and serving."""
    few = sorted({bits[0] for scheme in schemes if (bits := _FEW_BITS.search(scheme))})
    load = (
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", '
        'device_map="auto")\n```'
    )
    if packed:
        first = "import rac_modifier  # lets transformers read packed sparse weights\n"
        load += (
            "\n\n`rac_modifier.load_model` does the same for a causal language model. "
            "`rac unpack` writes an ordinary dense checkpoint, which needs no rac_modifier."
        )
        option, serve = (
            "",
            (
                "rac_modifier must be installed beside vLLM: its plugin reads the packed weights. "
                "`rac inspect` shows which layers run on sparse kernels."
            ),
        )
    elif few:
        first, option = "", " --quantization rac"
        serve = (
            "rac_modifier must be installed beside vLLM, which has no kernel for "
            f"{' or '.join(few)} weights on a CPU."
        )
    else:
        first = option = ""
        serve = "The weights are stored dense, so stock vLLM serves them."
    return (
        f"## Load\n\n```python\n{first}from transformers import AutoModelForCausalLM\n\n{load}\n\n"
        f"## Serve\n\n```bash\nvllm serve path/to/this/folder{option}\n```\n\n{serve}"
    )


def _metadata(base: Any, license: License, tags: Sequence[str], before: str = "") -> str:
    """Return the front matter with the other entries of the card `before`."""
    known = front_matter(before)
    old_tags = [
        str(tag) for tag in known.get("tags") or () if tag not in _PACKED_TAGS or tag in tags
    ]
    entries: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    entries |= {key: value for key, value in known.items() if key not in _OURS}
    try:  # the hub refuses a card whose base model can be no id
        validate_repo_id(str(base or ""))
        base = str(base)
    except HFValidationError:
        base = None
    data = ModelCardData(
        **entries,
        base_model=base,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        tags=list(dict.fromkeys([*old_tags, *tags])),
    )
    return f"---\n{data.to_yaml()}\n---"


def _facts(record: Mapping[str, Any], license: License) -> Iterable[tuple[str, Any]]:
    """Yield the rows of the table of a run."""
    yield "Base model", record.get("base_model")
    yield "License", license.describe()
    if _is_pruned(record):
        yield "Pattern", record.get("pattern")
    if schemes := record.get("quantization"):
        yield "Quantization", "; ".join(map(str, schemes))
    yield "Solver", record.get("method")
    counts, stores = record.get("calibration"), record.get("trace_stores")
    yield "Calibration", _calibration(counts) if isinstance(counts, Mapping) else None
    for name, store in stores.items() if isinstance(stores, Mapping) else ():
        if isinstance(store, Mapping):
            yield str(name).capitalize(), _store(store)
    modifier = record.get("modifier")
    seed = modifier.get("seed") if isinstance(modifier, Mapping) else None
    yield "Seed", record.get("seed", seed)
    if record.get("recipe") is not None:
        yield "Recipe", record["recipe"]


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    """Return a table with a name and a value per row; None is "not recorded"."""
    return "\n".join(
        ["| | |\n|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]
    )


def _cell(value: Any) -> str:
    if value is None:
        return "not recorded"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("|", "\\|").replace("\n", " ")


def _store(store: Mapping[str, Any]) -> str:
    path, sha256 = (store.get(key, "unrecorded") for key in ("path", "sha256"))
    text, selection = f"`{path}`, sha256 `{sha256}`", store.get("selection")
    if isinstance(selection, Mapping) and selection.get("kept") != selection.get("of"):
        chosen, of = number(selection.get("kept")), number(selection.get("of"))
        text += f", {chosen} of its {of} traces selected"
    return text


def _calibration(counts: Mapping[str, Any]) -> str:
    """Describe the calibration set by its counts of tokens."""
    text = [f"{number(counts[key])} {words}" for key, words in _COUNTS.items() if key in counts]
    for key, value in counts.items():
        if key not in _COUNTS and key != "parts":
            text.append(f"{number(value)} {key.replace('_', ' ')}")
    parts = counts.get("parts")
    if isinstance(parts, Mapping) and len(parts) > 1:
        counted = {name: part for name, part in parts.items() if isinstance(part, Mapping)}
        tokens = (f"{name} {number(part.get('tokens'))}" for name, part in counted.items())
        text.append(f"by part: {', '.join(tokens)} tokens")
    return "; ".join(text)


def _layers(record: Mapping[str, Any]) -> str:
    """Count the modules, and name the five with the largest errors."""
    modules = [module for module in record.get("modules") or () if isinstance(module, Mapping)]
    if not modules:
        return ""
    pruned = _is_pruned(record)
    text = f"{len(modules)} linear modules were "
    text += "pruned" if pruned else "quantized (errors are after rounding)"
    quantized = sum(1 for module in modules if module.get("quantization"))
    if quantized and pruned:
        text += f", {quantized} of them quantized in the same pass (errors are after rounding)"
    sparsities = [module["sparsity"] for module in modules if is_number(module.get("sparsity"))]
    if sparsities:
        text += f", each to a sparsity of {min(sparsities):.4f} to {max(sparsities):.4f}"
    text += "."
    if raised := sum(1 for module in modules if module.get("retries")):
        text += f" The dampening had to be raised for {raised} of them."
    measured = [module for module in modules if is_number(module.get("relative_error"))]
    if worst := sorted(measured, key=lambda module: -module["relative_error"])[:5]:
        rows = (f"| `{row.get('name', '?')}` | {row['relative_error']:.4g} |" for row in worst)
        text += "\n\nLargest relative errors of the outputs on the calibration tokens:\n\n"
        text += "\n".join(["| module | error |\n|---|---|", *rows])
    return f"{text}\n\nAll modules are in `rac_run.json`."


def _is_pruned(record: Mapping[str, Any]) -> bool:
    """Tell whether weights were pruned, which an old record may not say."""
    return record.get("pattern") is not None or not record.get("quantization")


def _versions(record: Mapping[str, Any]) -> str:
    versions = record.get("versions")
    if not isinstance(versions, Mapping):
        return ""
    known = (f"{name} {value}" for name, value in versions.items() if value is not None)
    return f"Made with {', '.join(known)}."


def _card_of(folder: Path) -> str:
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _body(card: str) -> str:
    """Return the text of a card behind its front matter."""
    if card.startswith("---\n") and "\n---" in card[3:]:
        card = card[4:].partition("\n---")[2].lstrip("-")
    return card.strip()
