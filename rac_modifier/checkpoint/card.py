"""The run record of a saved model, and the card (README.md) that is written from it."""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from rac_modifier.checkpoint.files import CONFIG_FILE
from rac_modifier.checkpoint.output_folder import cached_file
from rac_modifier.errors import RacError
from rac_modifier.formats.quantization_config import with_int8_activations
from rac_modifier.runtime import files

CARD_NAME = "README.md"
# The lines before and behind a part of a card that is replaced.
_USE = ("<!-- how to use these weights -->", "<!-- end of how to use these weights -->")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
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
_SERVE_PACKED = (
    "rac_modifier must be installed next to vLLM: its plugin reads the packed weights. "
    "`rac unpack` writes an ordinary dense checkpoint, which needs no rac_modifier."
)
_SERVE_DENSE = (
    "Stock vLLM serves these weights where it has a kernel for them. rac_modifier, installed next "
    "to it, adds CPU kernels for int4, int3 and int2."
)


def model_card(record: Mapping[str, Any], license: Mapping[str, str], packed: bool = True) -> str:
    """Return the card of a run; what is not in the record has no row.

    `license` is the base model's (`license_of`). Not `packed`: stock loaders read the weights.
    """
    base, schemes = record.get("base_model"), record.get("quantization") or ()
    # a folder that is there comes first
    is_hub_id = bool(_HUB_ID.fullmatch(base or "")) and not Path(str(base)).is_dir()
    words = ["pruned"] * (record.get("pattern") is not None) + ["quantized"] * bool(schemes)
    verb = " and ".join(words) or "compressed"
    tags = [*words, *(["sparse"] if "pruned" in words else [])]
    tags += ["reasoning", "rac", "llm-compressor", "compressed-tensors"]
    front_matter = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if is_hub_id else {}),  # the hub refuses others
        **license,
        "tags": tags,
    }
    counts = record.get("calibration") or {}
    rows = {
        "Base model": base,
        "Pattern": record.get("pattern"),
        "Quantization": "; ".join(schemes),
        "Solver": record.get("method"),
        "Calibration": ", ".join(
            f"{name.replace('_', ' ')} {count:,}"
            for name, count in counts.items()
            if name != "parts"
        ),
        "Recipe": record.get("recipe"),
    }
    divergence = _divergence(record.get("divergence") or {})
    card = _RUN.format(
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        title=f"{base} {verb}" if base else f"A {verb} language model",
        Verb=verb.capitalize(),
        record=RUN_RECORD_NAME,
        table=_table(rows),
        divergence=divergence and f"{divergence}\n\n",
    )
    return _with_part(card, _USE, _how_to_use(packed))


def converted_card(record: Mapping[str, Any], source: Path, packed: bool) -> str:
    """Return the card of `source` for its weights packed or unpacked; its other text is kept."""
    card = _text(source, CARD_NAME) or f"# {record.get('base_model')}\n"
    if "packing" in record and not packed:
        return _with_part(card, _USE, "")
    return _with_part(card, _USE, _how_to_use(packed))


def license_of(model: str | Path) -> dict[str, str]:
    """Return the license entries of a model's card, or of its config.json; no network is used."""
    card = _file(model, CARD_NAME)
    try:
        entries = (metadata_load(card) if card else None) or {}
    except (ValueError, yaml.YAMLError):
        entries = {}
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
        raise RacError(f"--card: {folder} is not writable; copy the model, or leave --card out")
    return folder


def add_measured(folder: Path, lines: Iterable[str], content: Mapping[str, Any]) -> None:
    """Write what `rac eval` prints into a card, and `content`, its JSON, into the run record."""
    kind = "divergence" if "divergence" in content else "accuracy"
    results = content.get(kind) or content["results"]
    figures = [
        {name: value for name, value in result.items() if isinstance(value, (str, int, float))}
        for result in results
    ]
    record = files.read_json(folder / RUN_RECORD_NAME)
    before = record.get("evaluation")
    record["evaluation"] = {**(before if isinstance(before, dict) else {}), kind: figures}
    text = files.text_without_paths("\n".join(lines), content)
    marks = (f"<!-- {kind} by rac eval -->", f"<!-- end of {kind} by rac eval -->")
    section = f"## Measured with rac eval: {kind}\n\n```text\n{text}\n```"
    card = _with_part(_text(folder, CARD_NAME), marks, section)
    files.write_json_atomic(folder / RUN_RECORD_NAME, files.without_paths(record))
    files.write_text_atomic(folder / CARD_NAME, card)


def _with_part(card: str, marks: tuple[str, str], text: str) -> str:
    """Return a card with the text between the marks replaced, or appended; "" removes it.

    Without the mark at its end, what is old cannot be told from what is not: all is kept.
    """
    begin, end = marks
    before, _, rest = card.partition(begin)
    after = (rest.partition(end)[2] if end in rest else rest).strip()
    part = f"{begin}\n{text}\n{end}" if text else ""
    sections = (section for section in (before.rstrip(), part, after) if section)
    return "\n\n".join(sections) + "\n"


def _how_to_use(packed: bool) -> str:
    """Return the sections with the commands for loading and serving."""
    first = "import rac_modifier  # lets transformers read packed sparse weights\n"
    return _HOW_TO_USE.format(
        first=first if packed else "", serve=_SERVE_PACKED if packed else _SERVE_DENSE
    )


def _table(rows: Mapping[str, Any]) -> str:
    """Return a table with a name and a value per row; an empty value has no row."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        if value not in (None, ""):
            text = " ".join(str(value).replace("|", "\\|").split())
            lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def _file(model: str | Path, name: str) -> Path | None:
    """Return a file of a folder, or of a hub id in the cache; None without one."""
    path = Path(model) / name if Path(model).is_dir() else cached_file(str(model), name)
    return path if path is not None and path.is_file() else None


def _text(model: str | Path, name: str) -> str:
    """Return the text of such a file, "" without one."""
    path = _file(model, name)
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")


def _divergence(measured: Mapping[str, Any]) -> str:
    """Return KL with its 95 % interval, and agreement; "" where they were not measured."""
    if "kl" not in measured:
        return ""
    kl, error = measured["kl"], measured.get("kl_stderr")
    interval = f" ({measured.get('sequences')} sequences are too few for an interval)"
    if error is not None:
        low, high = max(0.0, kl - 1.96 * error), kl + 1.96 * error
        interval = f" (95 % interval {low:.3f} to {high:.3f})"
    return (
        f"On {measured['tokens']:,} tokens that the base model generated and that were not used "
        f"for calibration: KL divergence from the base model {kl:.3f} nats per token{interval}; "
        f"the most likely token is the same for {measured['agreement']:.1%} of the tokens."
    )


RUN_RECORD_NAME = "rac_run.json"
_PACKAGES = "rac-modifier torch transformers safetensors compressed-tensors llmcompressor"


def environment() -> dict[str, str | int | None]:
    """Return versions by package (None: not installed), Python, platform and number of CPUs."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    versions = {name.replace("-", "_"): installed.get(name) for name in _PACKAGES.split()}
    return {
        **versions,
        "rac_modifier": versions["rac_modifier"] or "run from a source tree",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def record_activations(folder: Path, modules: Sequence[str], entry: Mapping[str, Any]) -> None:
    """Write modules with 8-bit activations into config.json and the run record, if there is one."""
    if (folder / RUN_RECORD_NAME).is_file():
        record = files.read_json(folder / RUN_RECORD_NAME)
        record["activations"] = files.without_paths(dict(entry))
        files.write_json_atomic(folder / RUN_RECORD_NAME, record)
    config = with_int8_activations(files.read_json(folder / CONFIG_FILE), modules)
    files.write_json_atomic(folder / CONFIG_FILE, config)
