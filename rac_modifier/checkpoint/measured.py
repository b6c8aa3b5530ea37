"""What was measured of a saved model: kept in its run record, and shown in its card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rac_modifier.checkpoint.record import CARD_NAME, RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE, with_int8_activations
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, without_paths, write_json_atomic, write_text_atomic

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
        conditions: `source` (of the problems) and `prompt` in words; `protocol`: further lines.
        reference: the same of the model that it is compared with; for a divergence, only its
            `label`.
        paired: the comparison of both, problem by problem, in words, without paths.

    Raises:
        RacError: record or card cannot be read or written.
    """
    fields = _ACCURACY if kind == "accuracy" else _DIVERGENCE

    def figures(of: Mapping[str, Any]) -> dict[str, Any]:
        return {name: of[name] for name in fields if name in of}

    entry = {**figures(result), **conditions, "paired": paired}
    entry["reference"] = None if reference is None else figures(reference)
    record = read_json(folder / RUN_RECORD_NAME)
    before = record.get(KEY)
    before = before if isinstance(before, Mapping) else {}
    record[KEY] = without_paths({**before, kind: entry})
    card = folder / CARD_NAME
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except (OSError, UnicodeError) as error:
        raise RacError(f"{card}: cannot be read ({error}); mend it, or leave --card out") from error
    write_json_atomic(folder / RUN_RECORD_NAME, record)
    write_text_atomic(card, with_measured(text, record))


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


def with_measured(card: str, record: Mapping[str, Any]) -> str:
    """Return a card with the section of measured figures; its other text is unchanged."""
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


def divergence_sentence(measured: Any, tokens_of: str) -> str:
    """Return KL and agreement with their 95 % intervals, "" where they were not measured.

    `tokens_of`: the text behind "On N tokens ".
    """
    if not isinstance(measured, Mapping) or not (
        is_number(measured.get("kl")) and is_number(measured.get("agreement"))
    ):
        return ""
    kl, agreement = _interval(measured, "kl", ".4f"), _interval(measured, "agreement", ".1%")
    return (
        f"On {number(measured.get('tokens', '?'))} tokens {tokens_of}: the predictions "
        f"differ from those of the base model by {measured['kl']:.4f} nats per token (KL "
        f"divergence{f', {kl}' if kl else ''}), and the most likely token is the same for "
        f"{measured['agreement']:.1%} of the tokens{f' ({agreement})' if agreement else ''}."
    )


def is_number(value: Any) -> bool:
    """Tell whether a value of a record is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> str:
    """Return a number with its thousands separated, any other value as text."""
    return f"{value:,}" if is_number(value) else str(value)


def _section(measured: Any) -> str:
    if not isinstance(measured, Mapping):
        return ""
    parts = [_accuracy(measured.get("accuracy")), _divergence(measured.get("divergence"))]
    text = "\n\n".join(part for part in parts if part)
    return f"## Measured after compression\n\n{text}" if text else ""


def _accuracy(measured: Any) -> str:
    if not isinstance(measured, Mapping) or not is_number(measured.get("accuracy")):
        return ""
    reference, rows = measured.get("reference"), [("this model", measured)]
    if isinstance(reference, Mapping):
        rows.insert(0, (str(reference.get("label")).replace("|", "\\|"), reference))
    lines = ["| | correct answers | 95 % interval | thinking tokens | unfinished |"]
    lines.append("|---|---|---|---|---|")
    for name, row in rows:
        interval = f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
        tokens, unfinished = f"{row['mean_thinking_tokens']:.0f}", f"{row['unfinished_share']:.1%}"
        lines.append(f"| {name} | {row['accuracy']:.1%} | {interval} | {tokens} | {unfinished} |")
    samples, temperature = measured["samples"], measured["temperature"]
    answers = "one answer" if samples == 1 else f"{samples} answers"
    how = "greedy" if temperature == 0 else f"temperature {temperature}"
    lines += [
        "",
        f"{number(measured['problems'])} problems ({measured.get('source')}, seed "
        f"{measured['seed']}), {answers} to each, at most {number(measured['cap'])} new "
        f"tokens, {how}; prompt: {measured.get('prompt')}. Measured with `rac eval`.",
    ]
    most = max(measured["pass_at"], key=int, default="1")
    if most != "1":
        share = f"{measured['pass_at'][most]:.1%}"
        lines.append(f"At least one of {most} answers is correct for {share} of the problems.")
    if isinstance(measured.get("protocol"), list):
        lines += map(str, measured["protocol"])
    if measured.get("paired"):
        lines += ["", f"{measured['paired']}."]
    return "\n".join(lines)


def _divergence(measured: Any) -> str:
    if not isinstance(measured, Mapping):
        return ""
    reference, source = measured.get("reference"), measured.get("source")
    label = reference.get("label") if isinstance(reference, Mapping) else "the base model"
    text = divergence_sentence(measured, f"that {label} generated ({source})")
    prompt = f"Prompt: {measured.get('prompt')}. Measured with `rac eval --divergence`."
    return f"{text} {prompt}" if text else ""


def _interval(measured: Mapping[str, Any], key: str, style: str) -> str:
    """Return the 95 % interval of a figure that has a standard error, "" for others."""
    error = measured.get(f"{key}_stderr")
    if not isinstance(error, (int, float)):
        return ""
    low, high = max(0.0, measured[key] - 1.96 * error), measured[key] + 1.96 * error
    if key == "agreement":
        high = min(high, 1.0)
    return f"95 % interval {low:{style}} to {high:{style}}"
