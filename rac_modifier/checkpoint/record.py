"""The run record of a saved model: versions, license, and what was measured of it later."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from rac_modifier.checkpoint.files import CONFIG_FILE
from rac_modifier.checkpoint.output_folder import cached_file
from rac_modifier.checkpoint.quantization_config import with_int8_activations
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, without_paths, write_json_atomic, write_text_atomic

RUN_RECORD_NAME = "rac_run.json"
CARD_NAME = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
_BEGIN, _END = "<!-- measured by rac eval -->", "<!-- end of what rac eval measured -->"
_PACKAGES = (
    *("rac-modifier", "torch", "transformers", "safetensors"),
    *("compressed-tensors", "llmcompressor"),
)


def environment() -> dict[str, str | int | None]:
    """Return versions by package (None: not installed), Python, platform and number of CPUs."""
    versions: dict[str, str | int | None] = {}
    for name in _PACKAGES:
        try:
            versions[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name.replace("-", "_")] = None
    versions["rac_modifier"] = versions["rac_modifier"] or "run from a source tree"
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def license_of(model: str | Path) -> dict[str, str]:
    """Return the license entries of a model's card, or of its config.json; no network is used."""
    metadata, _ = split_card(_text(model, CARD_NAME))
    if isinstance(metadata.get("license"), str):
        return {key: str(metadata[key]) for key in LICENSE_KEYS if metadata.get(key)}
    try:
        license = json.loads(_text(model, CONFIG_FILE))["license"]
    except (ValueError, TypeError, KeyError):  # another reader reports a malformed config.json
        license = None
    return {"license": license if license and isinstance(license, str) else "unknown"}


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of a card, {} where it cannot be read, and the text behind it."""
    match = re.match(r"---\n(.*?)\n---[^\n]*(\n.*)?$", card, re.DOTALL)
    if match is None:
        return {}, card.strip()
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, (match[2] or "").strip()


def card_text(folder: Path) -> str:
    """Return the card of a folder, "" where it has none."""
    return _text(folder, CARD_NAME)


def _text(model: str | Path, name: str) -> str:
    path = Path(model) / name if Path(model).is_dir() else cached_file(str(model), name)
    if path is None or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def record_activations(folder: Path, modules: Sequence[str], entry: Mapping[str, Any]) -> None:
    """Write the modules with activations in 8 bits into config.json and the run record.

    A model of another tool has no run record, and gets none.
    """
    if (folder / RUN_RECORD_NAME).is_file():
        record = read_json(folder / RUN_RECORD_NAME)
        record["activations"] = without_paths(dict(entry))
        write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_int8_activations(folder, modules)


def write_int8_activations(folder: Path, modules: Sequence[str]) -> None:
    """Write the modules with activations in 8 bits into config.json of a model."""
    config = with_int8_activations(read_json(folder / CONFIG_FILE), modules)
    write_json_atomic(folder / CONFIG_FILE, config)


def card_folder(model: str) -> Path:
    """Return the folder of a model that has a run record, which figures can be added to.

    Raises:
        RacError: a hub id, a folder without a run record, or one that cannot be written to.
    """
    folder = Path(model)
    if not (folder / RUN_RECORD_NAME).is_file():
        raise RacError(
            f"--card: {model} is not the folder of a model that rac wrote (it has no "
            f"{RUN_RECORD_NAME}), so there is no card to write to; name such a folder, alone "
            "or after the dense model, or leave --card out"
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

    Args:
        folder: of the model (`card_folder`).
        kind: what was measured.
        result: `as_dict()` of an EvalResult or a DivergenceResult.
        conditions: `source` (of the problems) and `prompt` in words; `protocol`: further lines.
        reference: the result of the model that it is compared with.
        paired: the comparison of both, problem by problem, in words, without paths.
    """
    entry = {**_figures(result), **conditions, "paired": paired}
    entry["reference"] = None if reference is None else _figures(reference)
    record = read_json(folder / RUN_RECORD_NAME)
    before = record.get("evaluation")
    before = before if isinstance(before, dict) else {}
    record["evaluation"] = without_paths({**before, kind: entry})
    card = with_measured(card_text(folder), record)
    write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_text_atomic(folder / CARD_NAME, card)


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and words of a result, without its lists of answers."""
    figures = {name: v for name, v in result.items() if isinstance(v, (str, int, float))}
    return figures | {name: result[name] for name in ("pass_at",) if name in result}


def with_measured(card: str, record: Mapping[str, Any]) -> str:
    """Return a card with the section of measured figures; its other text is unchanged."""
    measured = record.get("evaluation") or {}
    sections = [
        *([_accuracy(measured["accuracy"])] if "accuracy" in measured else []),
        *([_measured_divergence(measured["divergence"])] if "divergence" in measured else []),
    ]
    if not sections:
        return card
    text = "\n\n".join(["## Measured after compression", *sections])
    block = f"{_BEGIN}\n{text}\n{_END}"
    before, begin, old = card.partition(_BEGIN)
    if begin and _END in old:
        return before + block + old.partition(_END)[2]
    before, heading, after = card.partition("\n## Load\n")
    if heading:
        return f"{before}\n{block}\n{heading}{after}"
    return f"{card.rstrip()}\n\n{block}\n".lstrip()


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
    samples, temperature = measured["samples"], measured["temperature"]
    answers = "one answer" if samples == 1 else f"{samples} answers"
    how = "greedy" if temperature == 0 else f"temperature {temperature}"
    lines += [
        "",
        f"{measured['problems']:,} problems ({measured['source']}, seed {measured['seed']}), "
        f"{answers} to each, at most {measured['cap']:,} new tokens, {how}; prompt: "
        f"{measured['prompt']}. Measured with `rac eval`.",
    ]
    most = max(measured["pass_at"], key=int, default="1")
    if most != "1":
        share = f"{measured['pass_at'][most]:.1%}"
        lines.append(f"At least one of {most} answers is correct for {share} of the problems.")
    lines += measured.get("protocol") or []
    if measured.get("paired"):
        lines += ["", f"{measured['paired']}."]
    return "\n".join(lines)


def _measured_divergence(measured: Mapping[str, Any]) -> str:
    label = (measured.get("reference") or {}).get("label", "the base model")
    text = divergence(measured, f"that {label} generated ({measured['source']})")
    return f"{text} Prompt: {measured['prompt']}. Measured with `rac eval --divergence`."


def divergence(measured: Mapping[str, Any], tokens_of: str) -> str:
    """Return KL and agreement with their 95 % intervals, "" where they were not measured."""
    if "kl" not in measured:
        return ""
    kl, agreement = _interval(measured, "kl", ".4f"), _interval(measured, "agreement", ".1%")
    return (
        f"On {measured['tokens']:,} tokens {tokens_of}: the predictions "
        f"differ from those of the base model by {measured['kl']:.4f} nats per token (KL "
        f"divergence{f', {kl}' if kl else ''}), and the most likely token is the same for "
        f"{measured['agreement']:.1%} of the tokens{f' ({agreement})' if agreement else ''}."
    )


def _interval(measured: Mapping[str, Any], key: str, style: str) -> str:
    """Return the 95 % interval of a figure that has a standard error, "" for others."""
    error = measured.get(f"{key}_stderr")
    if error is None:
        return ""
    low, high = max(0.0, measured[key] - 1.96 * error), measured[key] + 1.96 * error
    high = min(high, 1.0) if key == "agreement" else high
    return f"95 % interval {low:{style}} to {high:{style}}"
