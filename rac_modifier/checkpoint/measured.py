"""What was measured of a compressed model after it was saved: kept in its run record, and shown in its model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rac_modifier.checkpoint.license import CARD_NAME
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, with_int8_activations
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_json_atomic, write_text_atomic
from rac_modifier.machine_paths import without_paths

KEY = "evaluation"  # in the run record
Kind = Literal["accuracy", "divergence"]
_BEGIN, _END = "<!-- measured by rac eval -->", "<!-- end of what rac eval measured -->"
_BEFORE = "\n## Load\n"  # the section goes in front of this one
_ACCURACY = (
    "label", "problems", "samples", "accuracy", "ci_low", "ci_high", "pass_at", "mean_thinking_tokens",
    "mean_completion_tokens", "unfinished_share", "cap", "temperature", "seed",
)  # fmt: skip
_DIVERGENCE = ("label", "sequences", "tokens", "kl", "kl_stderr", "agreement", "agreement_stderr")


def own_folder(model: str) -> Path:
    """The folder of a model that has a run record, which figures can be added to.

    Raises:
        RacError: a hub id, a folder without a run record, or one that cannot be written to.
    """
    folder = Path(model)
    if not (folder / RUN_RECORD_NAME).is_file():
        raise RacError(
            f"--card: {model} is not the folder of a model that rac wrote (it has no {RUN_RECORD_NAME}), so there is no card to "
            "write to; name such a folder, alone or after the dense model, or leave --card out"
        )
    if not os.access(folder, os.W_OK):
        raise RacError(
            f"--card: {folder} cannot be written to; copy the model, or leave --card out"
        )
    return folder


def add_measured(
    folder: Path,
    kind: Kind,
    result: Mapping[str, Any],
    *,
    conditions: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    paired: str | None = None,
) -> None:
    """Write figures into the record and the card of a model; they replace those of the same kind.

    Args:
        folder: of the model (`own_folder`).
        kind: what was measured.
        result: `as_dict()` of an EvalResult or a DivergenceResult.
        conditions: `source` (of the problems) and `prompt` in words; `protocol`: further lines, such as of a published one.
        reference: the same of the model that it is compared with; for a divergence, only its `label`.
        paired: the comparison of both, problem by problem, in words, without paths.

    Raises:
        RacError: record or card cannot be read or written.
    """
    fields = _ACCURACY if kind == "accuracy" else _DIVERGENCE
    entry = {
        **{name: result[name] for name in fields if name in result},
        **conditions,
        "reference": None
        if reference is None
        else {name: reference[name] for name in fields if name in reference},
        "paired": paired,
    }
    record = read_json(folder / RUN_RECORD_NAME)
    kept = record.get(KEY)
    record[KEY] = without_paths({**(kept if isinstance(kept, Mapping) else {}), kind: entry})
    card = folder / CARD_NAME
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except (OSError, UnicodeError) as error:
        raise RacError(f"{card}: cannot be read ({error}); mend it, or leave --card out") from error
    write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_text_atomic(card, with_measured(text, record))


def record_activations(folder: Path, modules: Sequence[str], entry: Mapping[str, Any]) -> None:
    """Write the modules with activations in 8 bits into config.json of a model, and what was measured into its run record.

    A model of another tool has no run record, and gets none.
    """
    if (folder / RUN_RECORD_NAME).is_file():
        record = read_json(folder / RUN_RECORD_NAME)
        write_json_atomic(
            folder / RUN_RECORD_NAME, {**record, "activations": without_paths(dict(entry))}
        )
    write_int8_activations(folder, modules)


def write_int8_activations(folder: Path, modules: Sequence[str]) -> None:
    """Write the modules with activations in 8 bits into config.json of a model."""
    write_json_atomic(
        folder / CONFIG_FILE, with_int8_activations(read_json(folder / CONFIG_FILE), modules)
    )


def with_measured(card: str, record: Mapping[str, Any]) -> str:
    """A card with the section of what the record says was measured; the rest of the card is as it was."""
    section = _section(record.get(KEY))
    if not section:
        return card
    block = f"{_BEGIN}\n{section}\n{_END}"
    before, begin, old = card.partition(_BEGIN)
    if begin and _END in old:
        return before + block + old.partition(_END)[2]
    before, heading, after = card.partition(_BEFORE)
    if heading:
        return f"{before}\n{block}\n{heading}{after}"
    return f"{card.rstrip()}\n\n{block}\n".lstrip()


def divergence_sentence(found: Any, tokens_of: str) -> str:
    """KL and agreement with their 95 % intervals, "" where they were not measured. `tokens_of`: behind "On N tokens "."""
    if not isinstance(found, Mapping) or not (
        is_number(found.get("kl")) and is_number(found.get("agreement"))
    ):
        return ""
    kl = f"{found['kl']:.4f} nats per token (KL divergence{_interval(found, 'kl', '.4f')})"
    agreement = f"{found['agreement']:.1%} of the tokens{_interval(found, 'agreement', '.1%')}"
    return (
        f"On {number(found.get('tokens', '?'))} tokens {tokens_of}: the predictions differ from those of the base model by {kl}, "
        f"and the most likely token is the same for {agreement}."
    )


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> str:
    """With thousands separated."""
    return f"{value:,}" if is_number(value) else str(value)


def _section(measured: Any) -> str:
    if not isinstance(measured, Mapping):
        return ""
    parts = [_accuracy(measured.get("accuracy")), _divergence(measured.get("divergence"))]
    text = "\n\n".join(part for part in parts if part)
    return f"## Measured after compression\n\n{text}" if text else ""


def _accuracy(found: Any) -> str:
    if not isinstance(found, Mapping) or not is_number(found.get("accuracy")):
        return ""
    reference = found.get("reference")
    rows = [("this model", found)]
    if isinstance(reference, Mapping):
        rows.insert(0, (str(reference.get("label")).replace("|", "\\|"), reference))
    lines = [
        "| | correct answers | 95 % interval | thinking tokens | unfinished |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {row['accuracy']:.1%} | {row['ci_low']:.1%} to {row['ci_high']:.1%} | {row['mean_thinking_tokens']:.0f} | "
        f"{row['unfinished_share']:.1%} |"
        for name, row in rows
    ]
    each = "one answer" if found["samples"] == 1 else f"{found['samples']} answers"
    how = "greedy" if found["temperature"] == 0 else f"temperature {found['temperature']}"
    lines += [
        "",
        f"{number(found['problems'])} problems ({found.get('source')}, seed {found['seed']}), {each} to each, at most "
        f"{number(found['cap'])} new tokens, {how}; prompt: {found.get('prompt')}. Measured with `rac eval`.",
    ]
    best = max(found["pass_at"], key=int, default="1")
    if best != "1":
        lines.append(
            f"At least one of {best} answers is correct for {found['pass_at'][best]:.1%} of the problems."
        )
    if isinstance(found.get("protocol"), list):
        lines += map(str, found["protocol"])
    if found.get("paired"):
        lines += ["", f"{found['paired']}."]
    return "\n".join(lines)


def _divergence(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    reference = found.get("reference")
    label = reference.get("label") if isinstance(reference, Mapping) else "the base model"
    text = divergence_sentence(found, f"that {label} generated ({found.get('source')})")
    return (
        f"{text} Prompt: {found.get('prompt')}. Measured with `rac eval --divergence`."
        if text
        else ""
    )


def _interval(found: Mapping[str, Any], key: str, style: str) -> str:
    """The 95 % interval of a figure with a standard error; both figures are at least 0, and a share at most 1."""
    error = found.get(f"{key}_stderr")
    if not isinstance(error, (int, float)):
        return ""
    low, high = max(0.0, found[key] - 1.96 * error), found[key] + 1.96 * error
    text = (
        f"95 % interval {low:{style}} to {min(high, 1.0) if key == 'agreement' else high:{style}}"
    )
    return f", {text}" if key == "kl" else f" ({text})"
