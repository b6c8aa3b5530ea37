"""What a plot draws, read from matplotlib's objects and not from pixels."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure


class Drawn:
    """The figure that was saved last."""

    figure: Figure


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Drawn:
    """Keeps the figure in place of writing it."""
    kept = Drawn()

    def savefig(figure: Figure, path: object) -> None:
        kept.figure = figure

    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]
    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept
