"""Mistakes about the trace store."""

import errno
import os
from typing import Any

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


@CASES.case(
    "a store that was filled under other settings",
    "sampling.max_new_tokens: 40 in the file, 41 asked for); use these, or name another file",
)
def _(b: Bench) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": 41}
    b.prune_with(traces={"store": str(b.store), "sampling": sampling})


@CASES.case(
    "another file in the place of the store", "is no file of traces or answers; name another"
)
def _(b: Bench) -> None:
    b.store.write_text("my diary")
    b.prune()


@CASES.case("no room on disk while sampling", "make room, then run again")
def _(b: Bench) -> None:
    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = b.store.read_bytes().splitlines(keepends=True)
    b.store.write_bytes(b"".join(lines[:3]))
    b.monkeypatch.setattr(os, "write", full)
    b.prune()


@CASES.case("correct answers only, from a model that gives none", "traces.select kept 0 of")
def _(b: Bench) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": 4, "batch_size": 64}
    store = str(b.tmp / "new.jsonl")
    b.prune_with(traces={"store": store, "sampling": sampling, "select": {"answers": "correct"}})


@CASES.case("`rac traces export` onto a trace store", "is a trace store, and stays as it is")
def _(b: Bench) -> None:
    b.rac("traces", "export", b.store, b.store)


@CASES.case("a text that is no selection in a command", "--select 'correct' is not a selection")
def _(b: Bench) -> None:
    b.rac("traces", "inspect", b.store, "--select", "correct")
