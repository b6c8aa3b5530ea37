"""Which traces of a store a run has used, by the hash in its record."""

import shutil

from rac_modifier.traces.fresh import fresh_traces, used_traces
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import TraceStore


def parts(trace_store, folder, *counts):
    """The store as it was when it had so many traces, each in a file of its own."""
    lines = trace_store.read_bytes().splitlines(keepends=True)
    found = []
    for count in counts:
        path = folder / f"{count}.jsonl"
        path.write_bytes(b"".join(lines[: 1 + count]))
        found.append(TraceStore.read(path))
    return found


def test_the_first_traces_are_told_by_the_hash_of_what_the_store_was(trace_store, tmp_path):
    none, five, nine = parts(trace_store, tmp_path, 0, 5, 9)
    whole = TraceStore.read(trace_store)
    assert used_traces(whole, [five.sha256()]) == 5
    assert used_traces(whole, [nine.sha256(), five.sha256()]) == 9
    assert used_traces(whole, [whole.sha256()]) == len(whole)
    assert used_traces(whole, [none.sha256(), "another"]) == 0
    assert used_traces(five, [nine.sha256()]) == 0


def test_fresh_traces_are_those_after_them(trace_store):
    store = TraceStore.read(trace_store)
    traces = list(store)
    fresh = fresh_traces(store, 5, 100)
    assert fresh == traces[5 : 5 + len(fresh)]
    assert sum(t.tokens for t in fresh[:-1]) < 100 <= sum(t.tokens for t in fresh)
    assert fresh_traces(store, len(traces), 100) == []


def test_fresh_traces_end_where_they_begin_to_repeat(trace_store, tmp_path):
    header = TraceStore.read(trace_store).header
    loops = [
        Trace(f"{i}#0", f"{i}", (1,) * 4, (*range(i), *(5, 6) * 50), "length", 0, "?", None)
        for i in range(4)
    ]
    with TraceStore.open_append(tmp_path / "loops.jsonl", header) as store:
        store.append_many(loops)
    fresh = fresh_traces(TraceStore.read(tmp_path / "loops.jsonl"), 1, 15)
    assert [t.completion_ids for t in fresh] == [
        (0, 5, 6),
        (0, 1, 5, 6),
    ]  # 7 and 8 tokens with their prompts


def test_a_line_that_is_being_written_does_not_count(trace_store, tmp_path):
    path = tmp_path / "torn.jsonl"
    shutil.copy(trace_store, path)
    with path.open("ab") as file:
        file.write(b'{"crc32":"')
    store = TraceStore.read(path)
    assert used_traces(store, [store.sha256()]) == len(store)
