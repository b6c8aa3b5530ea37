"""Results of `rac frontier` as one self-contained HTML page.

Drawn by few lines of our own SVG (assets/chart.js) and no plotting library. So each mark can be reached with the keyboard, the
page forbids every request and every script but its own (Content-Security-Policy with hashes, no eval), and 20 kB of the
5 MB are code. Nothing is read as markup: figures are JSON in which `<` is escaped, answers are gzip in base64, and the
scripts set text with textContent.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, PairedDifference, paired_difference
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE

MOST_BYTES = 5_000_000
"""Of a page. More than that is slow to open and to send."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_SMALLEST, _DECADES = (
    1e-3,
    4,
)  # of KL in nats: digit 0 is below, digit 1 starts there, digit z is at 10 or above


def page(folders: Sequence[Path], most_traces: int) -> str:
    """The page of one or several folders; those that share model, evaluation and the dense model's answers are shown together.

    On another processor the same model may write other answers, and KL along other answers cannot be compared.

    Args:
        folders: of `rac frontier`.
        most_traces: problems per folder whose answers can be read on the page.

    Raises:
        RacError: a folder without results or of another version, or one label in two folders that belong together.
    """
    studies: dict[str, list[FrontierFolder]] = {}
    for folder in folders:
        found = FrontierFolder.read(folder)
        if found.row(DENSE) is None:
            raise RacError(f"{folder}: the dense model was not measured; run its grid again")
        shared = [found.about, [trace["ids"] for trace in found.traces(DENSE)]]
        studies.setdefault(json.dumps(shared, sort_keys=True), []).append(found)
    data = {
        "studies": _named_apart(
            [_study(group) for group in studies.values()], list(studies.values())
        )
    }
    traces = [_traces(group, most_traces) for group in studies.values()]
    files = resources.files("rac_modifier.frontier") / "assets"
    text = {
        name: (files / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "chart.js", "page.js")
    }
    script = text["chart.js"] + text["page.js"]
    parts = {
        "STYLE_HASH": _hash(text["page.css"]),
        "SCRIPT_HASH": _hash(script),
        "STYLE": text["page.css"],
        "DATA": json.dumps(
            data, ensure_ascii=False, separators=(",", ":"), allow_nan=False
        ).replace("<", "\\u003c"),
        "TRACES": base64.b64encode(
            gzip.compress(json.dumps(traces, separators=(",", ":")).encode(), 9, mtime=0)
        ).decode(),
        "SCRIPT": script,
    }
    pieces = text["page.html"].split(
        "@"
    )  # in turn text and names; no part is searched for names again
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def problems_shown(folders: Sequence[Path], most_traces: int) -> int:
    """The largest number of problems of a folder whose answers a page of these shows."""
    return min(
        most_traces,
        max(FrontierFolder.read(folder).about["evaluation"]["problems"] for folder in folders),
    )


def check_size(text: str, path: Path, shown: int) -> None:
    """Refuse a page that is too large (RacError), before it is written. `shown`: problems whose answers are on it."""
    if (size := len(text.encode())) > MOST_BYTES:
        raise RacError(
            f"{path} would have {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f} MB; show the answers of fewer problems "
            f"than {shown} (--traces {shown * MOST_BYTES // size // 2}), or fewer folders"
        )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _named_apart(
    studies: list[dict[str, Any]], groups: list[list[FrontierFolder]]
) -> list[dict[str, Any]]:
    """Those of one model and one source get the name of their first folder, too."""
    names = [study["name"] for study in studies]
    return [
        study | ({"name": f"{name}, {group[0].folder.name}"} if names.count(name) > 1 else {})
        for study, name, group in zip(studies, names, groups, strict=True)
    ]


def _study(group: list[FrontierFolder]) -> dict[str, Any]:
    about = group[0].about
    asked = about["evaluation"]
    sampling = "greedy" if not asked["temperature"] else f"temperature {asked['temperature']:g}"
    text = (
        f"{about['model']}; every row answers the same {asked['problems']} held-out problems ({asked['source']}), {sampling}, "
        f"at most {asked['cap']} new tokens.\nKL and top-1 agreement are measured on the dense model's answers to them. Bytes "
        "are those of the tensors in the files."
    )
    return {
        "name": f"{about['model']}, {asked['source']}",
        "about": text,
        "rows": [
            _row(row) | {"benchmarks": _benchmarks(group, row["label"])} for row in _rows(group)
        ],
    }


def _rows(group: list[FrontierFolder]) -> list[dict[str, Any]]:
    """The rows of folders that belong together, the dense model first and once."""
    rows = {row["label"]: row for row in group[0].rows if row["label"] == DENSE}
    for folder in group:
        for row in folder.rows:
            if row["label"] in rows and row["label"] != DENSE:
                raise RacError(
                    f"{folder.folder}: {row['label']!r} is also a row of another of these folders; show them apart"
                )
            rows.setdefault(row["label"], row)
    return list(rows.values())


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a row."""
    accuracy, divergence, length, served = (
        row[name] for name in ("accuracy", "divergence", "length", "served")
    )
    recipe = (
        "the dense model"
        if row["recipe"] is None
        else yaml.safe_dump(row["recipe"], sort_keys=False, allow_unicode=True, width=100)
    )
    return {
        "label": row["label"],
        "group": row["group"],
        "recipe": recipe.strip(),
        "bytes": row["bytes"],
        "accuracy": accuracy and [accuracy["accuracy"], accuracy["ci_low"], accuracy["ci_high"]],
        "paired": row["paired"] and PairedDifference(**row["paired"]).describe(),
        "kl": divergence and [divergence["kl"], divergence["kl_stderr"]],
        "outside": (outside := row.get("outside_repetitions"))
        and [outside["kl"], outside["kl_stderr"]],
        "agreement": divergence and [divergence["agreement"], divergence["agreement_stderr"]],
        "length": {
            "mean": length["mean"],
            "percentiles": length["percentiles"],
            "cut": length["cut_share"],
            "repeating": length.get("repeating_share"),  # rows of earlier versions do not have it
            "thinking": length["thinking"],
        },
        "speed": (served or {}).get("tokens_per_second"),
        "not_served": (served or {}).get("not_measured"),
        "layers": [
            [name, values["error"], values["sparsity"]] for name, values in row["layers"].items()
        ],
    }


def _benchmarks(group: list[FrontierFolder], label: str) -> dict[str, dict[str, Any]]:
    """What the page needs of the published benchmarks of a row, by name."""
    found = [each for folder in group for each in folder.benchmarks]
    dense = {
        each["benchmark"]: EvalResult.from_dict(each["result"])
        for each in found
        if each["label"] == DENSE
    }
    values = {}
    for each in found:
        if each["label"] != label:
            continue
        name, result = each["benchmark"], EvalResult.from_dict(each["result"])
        paired = (
            None if label == DENSE or name not in dense else paired_difference(dense[name], result)
        )
        values[name] = {
            "accuracy": [result.accuracy, result.ci_low, result.ci_high],
            "asked": (
                f"{result.problems} problems, {result.samples} answer{'s' if result.samples > 1 else ''} each, "
                f"at most {result.cap:,} new tokens"
            ),
            "thinking": result.mean_thinking_tokens,
            "cut": result.unfinished_share,
            "paired": paired and paired.describe(),
        }
    return values


def _traces(group: list[FrontierFolder], most: int) -> dict[str, Any]:
    """The answers of the dense model, and by label those of each row."""
    rows = {}
    for folder in group:
        for row in folder.rows:
            if row["label"] != DENSE:
                rows[row["label"]] = [_own(trace) for trace in folder.traces(row["label"])[:most]]
    dense = [
        {**_common(trace), **{key: trace[key] for key in ("id", "question", "answer", "pieces")}}
        for trace in group[0].traces(DENSE)[:most]
    ]
    return {"dense": dense, "rows": rows}


def _common(trace: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: trace[key] for key in ("text", "correct", "finish")},
        "tokens": len(trace["ids"]),
    }


def _own(trace: dict[str, Any]) -> dict[str, Any]:
    same = {key: trace[key] for key in ("same_tokens", "same_characters")}
    return {**_common(trace), **same, "kl": "".join(map(kl_digit, trace.get("kl", [])))}


def kl_digit(kl: float) -> str:
    """KL in nats as one digit of base 36, on a logarithmic scale."""
    if kl < _SMALLEST:
        return _DIGITS[0]
    return _DIGITS[1 + min(34, round(34 * math.log10(kl / _SMALLEST) / _DECADES))]
