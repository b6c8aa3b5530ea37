"""Model cards (README.md) of compressed and packed checkpoints, written from the run record."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from rac_modifier.checkpoint.files import CONFIG_FILE
from rac_modifier.checkpoint.output_folder import cached_file
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, without_paths, write_json_atomic, write_text_atomic

CARD_NAME = "README.md"
# Parts of a card that are replaced: the lines before and behind.
_MEASURED = ("<!-- measured by rac eval -->", "<!-- end of what rac eval measured -->")
_USE = ("<!-- how to use these weights -->", "<!-- end of how to use these weights -->")
_FEW_BITS = re.compile(r"int[23]\b")  # in the text of a scheme; vLLM has no CPU kernel for them
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSE_KEYS = ("license", "license_name", "license_link")

_RUN = """\
---
{front_matter}---

# {title}

{Verb} after training with reasoning-aware compression (RAC, arXiv 2509.12464): the output of each \
linear layer on the calibration tokens is kept as closely as possible. `{record}` has all settings \
and the figures of each module.

{table}

## What is measured

{divergence}Accuracy, thinking length and speed are **not** measured during compression: before \
use, evaluate this model and its base model at the same token limit.
"""
_HOW_TO_USE = """\
## Load

```python
{first}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto", device_map="auto")
```

## Serve

```bash
vllm serve path/to/this/folder
```

{serve}"""


def model_card(record: Mapping[str, Any], license: Mapping[str, str], packed: bool = True) -> str:
    """Return the card of a run; what is not in the record has no row.

    `license` is the base model's (`license_of`). Not `packed`: stock loaders read the weights.
    """
    base, schemes = record.get("base_model"), record.get("quantization") or ()
    words = ["pruned"] * (record.get("pattern") is not None) + ["quantized"] * bool(schemes)
    verb = " and ".join(words) or "compressed"
    tags = [*words, *(["sparse"] if "pruned" in words else [])]
    tags += ["reasoning", "rac", "llm-compressor", "compressed-tensors"]
    front_matter = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if _HUB_ID.fullmatch(base or "") else {}),  # the hub refuses others
        **license,
        "tags": tags,
    }
    counts, versions = record.get("calibration") or {}, record.get("versions") or {}
    stores = (record.get("trace_stores") or {}).items()
    rows = {
        "Base model": base,
        "License": license.get("license_name") or license["license"],
        "Pattern": record.get("pattern"),
        "Quantization": "; ".join(schemes),
        "Solver": record.get("method"),
        "Calibration": ", ".join(
            f"{name.replace('_', ' ')} {count:,}"
            for name, count in counts.items()
            if name != "parts"
        ),
        **{
            name.capitalize(): f"`{s.get('path')}`, sha256 `{s.get('sha256')}`"
            for name, s in stores
        },
        "Seed": record.get("seed"),
        "Recipe": record.get("recipe"),
        "Made with": ", ".join(f"{name} {v}" for name, v in versions.items() if v is not None),
    }
    measured = _divergence(
        record.get("divergence") or {},
        "that the base model generated and that were not used for calibration",
    )
    card = _RUN.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        title=f"{base} {verb}" if base else f"A {verb} language model",
        Verb=verb.capitalize(),
        record=RUN_RECORD_NAME,
        table=_table(rows),
        divergence=measured and f"{measured}\n\n",
    )
    return _with_part(card, _USE, _how_to_use(packed, schemes))


def converted_card(record: Mapping[str, Any], source: Path, packed: bool) -> str:
    """Return the card of `source` for its weights packed or unpacked; its other text is kept.

    The record of a model that others pruned has the figures of `packing`; unpacked again, its
    card is as before.
    """
    card = _text(source, CARD_NAME) or f"# {record.get('base_model')}\n"
    if "packing" in record and not packed:
        return _with_part(card, _USE, "")
    return _with_part(card, _USE, _how_to_use(packed, record.get("quantization") or ()))


def license_of(model: str | Path) -> dict[str, str]:
    """Return the license entries of a model's card, or of its config.json; no network is used."""
    entries = _front_matter(_text(model, CARD_NAME))
    if isinstance(entries.get("license"), str):
        return {key: str(entries[key]) for key in _LICENSE_KEYS if entries.get(key)}
    try:
        license = json.loads(_text(model, CONFIG_FILE))["license"]
    except (ValueError, TypeError, KeyError):  # another reader reports a malformed config.json
        license = None
    return {"license": license if license and isinstance(license, str) else "unknown"}


def card_folder(model: str) -> Path:
    """Return the folder of a model that has a run record and can be written to (RacError)."""
    folder = Path(model)
    if not (folder / RUN_RECORD_NAME).is_file():
        raise RacError(
            f"--card: {model} is not the folder of a model that rac wrote (it has no "
            f"{RUN_RECORD_NAME}); name such a folder, or leave --card out"
        )
    if not os.access(folder, os.W_OK):
        raise RacError(
            f"--card: {folder} cannot be written to; copy the model, or leave --card out"
        )
    return folder


def add_measured(
    folder: Path,
    kind: Literal["accuracy", "divergence"],
    result: Mapping[str, Any],
    *,
    conditions: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    paired: str | None = None,
) -> None:
    """Write figures into the record and the card of a model; they replace figures of the same kind.

    result, reference: an EvalResult or a DivergenceResult as a dict.
    conditions: `source` (of the problems) and `prompt` in words; `protocol`: further lines.
    paired: the comparison of both models, problem by problem, in words, without paths.
    """
    entry = {**_figures(result), **conditions, "paired": paired}
    entry["reference"] = None if reference is None else _figures(reference)
    record = read_json(folder / RUN_RECORD_NAME)
    before = record.get("evaluation")
    before = before if isinstance(before, dict) else {}
    record["evaluation"] = without_paths({**before, kind: entry})
    measured, sections = record["evaluation"], ["## Measured after compression"]
    if "accuracy" in measured:
        sections.append(_accuracy(measured["accuracy"]))
    if result := measured.get("divergence"):
        label = (result.get("reference") or {}).get("label", "the base model")
        text = _divergence(result, f"that {label} generated ({result['source']})")
        sections.append(f"{text} Prompt: {result['prompt']}. Measured with `rac eval`.")
    card = _with_part(_text(folder, CARD_NAME), _MEASURED, "\n\n".join(sections))
    write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_text_atomic(folder / CARD_NAME, card)


def _with_part(card: str, marks: tuple[str, str], text: str) -> str:
    """Return a card with the text between the marks replaced, or appended; "" removes it."""
    begin, end = marks
    before, _, rest = card.partition(begin)
    after = rest.partition(end)[2].strip() if end in rest else ""
    part = f"{begin}\n{text}\n{end}" if text else ""
    sections = (section for section in (before.rstrip(), part, after) if section)
    return "\n\n".join(sections) + "\n"


def _how_to_use(packed: bool, schemes: Iterable[str] = ()) -> str:
    """Return the sections with the commands for loading and serving."""
    few_bits = sorted({bits[0] for scheme in schemes if (bits := _FEW_BITS.search(scheme))})
    first, serve = "", "Stock vLLM serves these weights where it has a kernel for them."
    if packed:
        first = "import rac_modifier  # lets transformers read packed sparse weights\n"
        serve = (
            "rac_modifier must be installed next to vLLM: its plugin reads the packed weights. "
            "`rac unpack` writes an ordinary dense checkpoint, which needs no rac_modifier."
        )
    elif few_bits:
        serve = (
            "rac_modifier must be installed next to vLLM, which has no kernel for "
            f"{' or '.join(few_bits)} weights on a CPU."
        )
    return _HOW_TO_USE.format(first=first, serve=serve)


def _table(rows: Mapping[str, Any]) -> str:
    """Return a table with a name and a value per row; an empty value has no row."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        if value not in (None, ""):
            text = " ".join(str(value).replace("|", "\\|").split())
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def _front_matter(card: str) -> dict[str, Any]:
    """Return the front matter of a card, {} where it cannot be read."""
    match = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    try:
        entries = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        entries = None
    return entries if isinstance(entries, dict) else {}


def _text(model: str | Path, name: str) -> str:
    """Return the text of a file of a folder or of a hub id in the cache, "" without one."""
    path = Path(model) / name if Path(model).is_dir() else cached_file(str(model), name)
    if path is None or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and words of a result, without its lists of answers."""
    figures = {name: v for name, v in result.items() if isinstance(v, (str, int, float))}
    return figures | {name: result[name] for name in ("pass_at",) if name in result}


def _accuracy(measured: Mapping[str, Any]) -> str:
    rows = {"this model": measured}
    if reference := measured.get("reference"):
        rows = {str(reference["label"]).replace("|", "\\|"): reference, **rows}
    lines = ["| | correct answers | 95 % interval | thinking tokens | unfinished |"]
    lines.append("|---|---|---|---|---|")
    for name, row in rows.items():
        interval = f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
        tokens, unfinished = f"{row['mean_thinking_tokens']:.0f}", f"{row['unfinished_share']:.1%}"
        lines.append(f"| {name} | {row['accuracy']:.1%} | {interval} | {tokens} | {unfinished} |")
    temperature = measured["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature}"
    lines += [
        "",
        f"{measured['problems']:,} problems ({measured['source']}, seed {measured['seed']}), "
        f"{measured['samples']} answers to each, at most {measured['cap']:,} new tokens, {how}; "
        f"prompt: {measured['prompt']}. Measured with `rac eval`.",
    ]
    lines += measured.get("protocol") or []
    if measured.get("paired"):
        lines += ["", f"{measured['paired']}."]
    return "\n".join(lines)


def _divergence(measured: Mapping[str, Any], tokens_of: str) -> str:
    """Return KL with its 95 % interval, and agreement; "" where they were not measured."""
    if "kl" not in measured:
        return ""
    kl, error, interval = measured["kl"], measured.get("kl_stderr"), ""
    if error is not None:
        low, high = max(0.0, kl - 1.96 * error), kl + 1.96 * error
        interval = f" (95 % interval {low:.4f} to {high:.4f})"
    return (
        f"On {measured['tokens']:,} tokens {tokens_of}: KL divergence from the base model "
        f"{kl:.4f} nats per token{interval}; the most likely token is the same for "
        f"{measured['agreement']:.1%} of the tokens."
    )
