"""`python -m bench.render` writes the tables of results/*.json into docs/ (`make results`).

A page has `<!-- table NAME -->` and `<!-- end -->`; between them is the table of
results/NAME.json. `<!-- table NAME without A; B -->` leaves columns out, and commands are shown
without their lists of rows. With --check nothing is written, and the exit status is 1 if a page
would change.
"""

import json
import re
import sys
from collections.abc import Collection
from itertools import compress
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT

_ROWS = re.compile(r" --(?:labels|forms) .*?(?= --|$)")  # the rows of the table, once more
_MARKED = re.compile(r"<!-- table (\w+)(?: without (.+?))? -->\n.*?<!-- end -->", re.DOTALL)


def cell(value: Any, form: str) -> str:
    """Format a cell: text, a number, None, [value, error], or [value, lowest, highest]."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    numbers = [format(number, form) for number in (value if isinstance(value, list) else [value])]
    return ("{}", "{} ± {}", "{} ({}-{})")[len(numbers) - 1].format(*numbers)


def table(result: dict[str, Any], without: Collection[str] = ()) -> str:
    """Return a result as a Markdown table with a line on how it was measured."""
    columns: dict[str, str] = result["columns"]
    if unknown := set(without) - set(columns):
        raise SystemExit(f"no columns {sorted(unknown)}; there are {list(columns)}")
    shown = [name not in without for name in columns]
    names = list(compress(columns, shown))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    gaps = result.get("gaps", {})
    for row in result["rows"]:
        if row[0] in gaps and not any(row[1:]):
            continue  # it has its line below
        cells = [cell(value, form) for value, form in zip(row, columns.values(), strict=True)]
        lines.append(f"| {' | '.join(compress(cells, shown))} |")
    keys = ("model", "machine", "date", "commit")
    command = _ROWS.sub("", result["command"])
    about = f"*{', '.join(result[key] for key in keys)}:* `{command}`"
    reasons = [f"- {name}: {reason}" for name, reason in gaps.items()]
    missing = ["Not measured:", "", *reasons, ""] if gaps else []
    return "\n".join([*lines, "", *missing, about])


def render(text: str, folder: Path = RESULTS) -> str:
    """Return a page with every marked table written anew from `folder`."""

    def replace(match: re.Match[str]) -> str:
        result = json.loads((folder / f"{match[1]}.json").read_text(encoding="utf-8"))
        without = match[2].split("; ") if match[2] else []
        head = match[0].partition("\n")[0]
        return f"{head}\n\n{table(result, without)}\n\n<!-- end -->"

    return _MARKED.sub(replace, text)


def main(arguments: list[str]) -> int:
    """Render all pages; return the exit status."""
    stale = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in arguments:
                page.write_text(rendered, encoding="utf-8")
    print("\n".join(stale) or "all tables are those of results/")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
