"""What the cases work with: the ways in, and how a case is written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import entry, recipe


@dataclass(frozen=True)
class Case:
    did: str
    says: str
    run: Callable[[Bench], Any]


class Cases(list[Case]):
    """The cases of one theme, in the order of the table."""

    def case(self, did: str, says: str) -> Callable[[Callable[[Bench], Any]], None]:
        """Add the decorated function as a case."""
        return lambda run: self.append(Case(did, says, run))


class Bench:
    """What the cases work with: a tiny model, a copy of its trace store, and the ways in."""

    def __init__(self, folder: Path, store: Path, tmp: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.tmp, self.monkeypatch = folder, tmp, monkeypatch
        self.store = tmp / "traces.jsonl"
        shutil.copy(store, self.store)

    def check(self, **settings: Any) -> None:
        """Validate a recipe entry, as every way in does."""
        from rac_modifier.settings.check import check_settings
        from rac_modifier.settings.entries import PruningEntry

        check_settings(PruningEntry, {"mask_structure": "2:4", **settings}, "recipe.yaml")

    def prune(self, model: Any = None, later: tuple[Any, ...] = (), **options: Any) -> None:
        """Run oneshot with a modifier object; `settings` of ours in `options["settings"]`."""
        from llmcompressor import oneshot

        from rac_modifier import ReasoningAwareSparseGPTModifier

        ours = ReasoningAwareSparseGPTModifier(**entry(self.store, **options.pop("settings", {})))
        oneshot(model=model or str(self.folder), recipe=[ours, *later], **options)

    def prune_with(self, **settings: Any) -> None:
        self.prune(settings=settings)

    def rac(self, *args: Any) -> None:
        """Run the command, its errors let through."""
        from rac_modifier import cli

        cli.app([str(arg) for arg in args], standalone_mode=False)

    def rac_prune(self, text: str | None = None, model: Any = None) -> None:
        path = self.tmp / "recipe.yaml"
        path.write_text(text or recipe(entry(self.store)))
        self.rac("prune", model or self.folder, self.tmp / "out", "-r", path)

    def problems(self, *rows: dict[str, Any], **source: Any) -> dict[str, Any]:
        """Trace settings whose problems are a file of these rows."""
        path = self.tmp / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = entry(self.tmp / "new.jsonl")["traces"]
        return {**settings, "problems": {"source": str(path), **source}}
