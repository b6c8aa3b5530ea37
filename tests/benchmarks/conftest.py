"""What the tests of peers.py share."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEYS = [
    "name",
    "weight_bytes",
    "first_token_s",
    "ms_per_token",
    "tokens_per_s",
    "kl",
    "runs",
    "failed",
]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_table

    return peer_table


@pytest.fixture
def peers(tables, monkeypatch):
    """peers.py on an environment where only gguf is missing."""
    import peer_contenders
    import peers

    monkeypatch.setattr(
        peer_contenders, "find_spec", lambda package: None if package == "gguf" else package
    )
    return peers
