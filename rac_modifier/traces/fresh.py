"""The traces of a store that a run did not use yet: those that were appended after it.

A run record holds the SHA-256 of each store as the run read it. A store only grows, so that what the run used is the part of the
file with that hash, however long the file is now.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from itertools import islice

from rac_modifier.traces.records import Trace
from rac_modifier.traces.repeats import without_repeats
from rac_modifier.traces.store import TraceStore


def used_traces(store: TraceStore, hashes: Collection[str]) -> int:
    """How many of the store's first traces a run used whose record has one of these hashes; 0 where none is of this store."""
    digest, used = hashlib.sha256(), 0
    with store.path.open("rb") as file:
        digest.update(file.readline())  # the header
        for number in range(1, len(store) + 1):
            digest.update(file.readline())
            if digest.hexdigest() in hashes:
                used = number
    return used


def fresh_traces(store: TraceStore, used: int, tokens: int) -> list[Trace]:
    """The traces after the first `used`, in their order, up to the one that reaches `tokens` prompt and completion tokens.

    Tails that repeat are cut, as `traces.select.repeated_tails` does by default.
    """
    chosen: list[Trace] = []
    for trace in map(without_repeats, islice(store, used, None)):
        if tokens <= 0:
            break
        chosen.append(trace)
        tokens -= trace.tokens
    return chosen
