"""Results of `rac frontier` as one self-contained HTML page.

Vega-Lite draws the charts; its JavaScript is inlined. The page allows no request and no script but
its own (Content-Security-Policy with hashes, no eval). Nothing is read as markup: text is escaped,
and figures and answers are JSON, gzip in base64, which the script sets with textContent.
"""

import base64
import functools
import gzip
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from rac_modifier.errors import RacError, refusing
from rac_modifier.evaluation.results import PairedDifference
from rac_modifier.frontier.folder import TRACES, FrontierFolder
from rac_modifier.settings.grid import DENSE

MOST_BYTES = 1_500_000  # of a page; more is slow to open and to send
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# KL in nats: digit 0 is below, digit 1 starts there, digit z is at 10 or above
_SMALLEST, _DECADES = 1e-3, 4


def page(folders: Sequence[Path], most_traces: int) -> str:
    """Return the page of folders of `rac frontier`, with up to `most_traces` answers each."""
    if not all(map(importlib.util.find_spec, ("altair", "vl_convert"))):
        raise RacError("the page needs altair and vl-convert; pip install 'rac-modifier[eval]'")
    results = list(map(FrontierFolder.read, folders))
    studies = [_study(folder, most_traces, number) for number, folder in enumerate(results, 1)]
    sections, data = zip(*studies, strict=True)
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), 9, mtime=0)
    style, script, library = _asset("page.css"), _asset("page.js"), _vega()
    text = Template(_asset("page.html")).substitute(
        style_hash=_hash(style),
        script_hashes=" ".join(f"'{_hash(text)}'" for text in (library, script)),
        style=style,
        sections="\n".join(sections),
        data=base64.b64encode(packed).decode(),
        library=library,
        script=script,
    )
    if (size := len(text.encode())) > MOST_BYTES:
        problems = max(len(study["traces"]["dense"]) for study in data)
        raise RacError(
            f"the page has {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.1f} MB; show the "
            f"answers of fewer problems than {problems} (--traces), or fewer folders"
        )
    return text


@functools.cache
def _vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed (BSD-3-Clause) as a script."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _asset(name: str) -> str:
    return (resources.files("rac_modifier.frontier") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return a hash as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _described(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accuracy of a row as [mean, low, high], its endings, and notes."""
    interval, notes, endings = None, [], []
    if values := row["accuracy"]:
        interval = [values["accuracy"], values["ci_low"], values["ci_high"]]
        endings = [ending for samples in values["endings"].values() for ending in samples]
    if row["paired"]:
        notes.append(PairedDifference(**{**row["paired"], "inflation": None}).describe())
    if reason := (row["served"] or {}).get("not_measured"):
        notes.append(f"not served: {reason}")
    return {"interval": interval, "notes": notes, "endings": endings}


def _study(folder: FrontierFolder, most_traces: int, number: int) -> tuple[str, dict[str, Any]]:
    """Return the markup of a folder, and what its script reads."""
    from rac_modifier.frontier.charts import AXES, charts

    about, traces = folder.about, _shown_traces(folder, most_traces)
    rows = [row | _described(row) for row in folder.rows]
    evaluation = about["evaluation"]
    sampling = (
        f"temperature {evaluation['temperature']:g}" if evaluation["temperature"] else "greedy"
    )
    axes = [axis for axis, (place, _) in AXES.items() if any(map(place, rows))]
    row = next((row["label"] for row in rows if row["label"] != DENSE), DENSE)
    specs = charts(rows, traces, {"row": row, "axis": axes[0], "find": ""})
    section = Template(_asset("study.html")).substitute(
        name=escape(f"{number}. {about['model']}, {evaluation['source']}"),
        about=escape(
            f"Every row answers the same {evaluation['problems']} held-out problems, {sampling}, "
            f"at most {evaluation['cap']} new tokens. KL and top-1 agreement are measured on the "
            "dense model's answers. Bytes are counted from the tensors in the files."
        ),
        rows=_options(row["label"] for row in rows),
        axes=_options(axes),
        charts="".join(f"<figure>{_tag('figcaption', c)}<div></div></figure>" for c in specs),
        table=_table(rows),
        recipes="".join(_recipe(row) for row in rows),
    )
    return section, {"charts": list(specs.values()), "row": row, "traces": traces}


def _tag(name: str, text: str) -> str:
    return f"<{name}>{escape(text)}</{name}>"


def _options(names: Iterable[str]) -> str:
    # with a value: the text of an option loses its double spaces
    return "".join(f'<option value="{escape(n)}">{escape(n)}</option>' for n in names)


def _recipe(row: Mapping[str, Any]) -> str:
    recipe = "the dense model"
    if row["recipe"]:
        recipe = yaml.safe_dump(row["recipe"], sort_keys=False, allow_unicode=True, width=100)
    notes = (f"# {line}" for note in row["notes"] for line in note.splitlines())
    text = "\n".join([recipe.strip(), *notes])
    return f'<pre data-label="{escape(row["label"])}" hidden>{escape(text)}</pre>'


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the table of rows, without the columns that no row has."""
    cells = [_cells(row) for row in rows]
    heads = [head for head in cells[0] if any(row[head] for row in cells)]
    body = [
        f'<tr data-label="{escape(row["label"])}">'
        + "".join(_tag("td", cell[head] or "-") for head in heads)
        for row, cell in zip(rows, cells, strict=True)
    ]
    return f"<tr>{''.join(_tag('th', head) for head in heads)}" + "".join(body)


def _cells(row: Mapping[str, Any]) -> dict[str, str | None]:
    sizes, divergence = row["bytes"], row["divergence"] or {}
    error, speed = divergence.get("kl_stderr"), (row["served"] or {}).get("tokens_per_second")
    kl = divergence and _nats(divergence["kl"]) + (f" ± {_nats(error)}" if error else "")
    right = None
    if row["interval"]:
        mean, low, high = row["interval"]
        right = f"{mean:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    return {
        "row": row["label"],
        "MB": f"{sizes['total'] / 1e6:.3f}",
        "MB without head and embeddings": f"{sizes['matrices'] / 1e6:.3f}",
        "bits per weight": f"{sizes['bits_per_weight']:.2f}",
        "KL": kl or None,
        "top-1": divergence and f"{divergence['agreement']:.2%}",
        "right": right,
        "thinking tokens": f"{row['thinking']:.0f}",
        "truncated": f"{row['truncated']:.1%}",
        "tokens/s": speed and f"{speed:.0f}",
    }


def _shown_traces(folder: FrontierFolder, most: int) -> dict[str, Any]:
    """Return the answers of the dense model, and by label the answers of each row."""
    step = "remove the lines of its rows, and run the grid again"
    with refusing(f"{folder.folder / TRACES}: damaged traces", step, LookupError, TypeError):
        rows = {
            row["label"]: [
                _trace(trace, "same_tokens", "same_characters")
                | {"kl": "".join(map(_kl_digit, trace["kl"]))}
                for trace in folder.traces(row["label"])[:most]
            ]
            for row in folder.rows
            if row["label"] != DENSE
        }
        dense = [
            _trace(trace, "id", "question", "answer", "pieces")
            for trace in folder.traces(DENSE)[:most]
        ]
    return {"dense": dense, "rows": rows}


def _nats(kl: float) -> str:
    """Return KL with three decimals; below them with one digit."""
    return f"{kl:.3f}" if kl >= 0.0005 else f"{kl:.0e}"


def _trace(trace: Mapping[str, Any], *more: str) -> dict[str, Any]:
    names = ("text", "correct", "finish", "kind", "loop", *more)
    return {name: trace[name] for name in names} | {"tokens": len(trace["ids"])}


def _kl_digit(kl: float) -> str:
    """Return KL in nats as a digit of base 36, on a logarithmic scale."""
    if kl < _SMALLEST:
        return _DIGITS[0]
    return _DIGITS[1 + min(34, round(34 * math.log10(kl / _SMALLEST) / _DECADES))]
