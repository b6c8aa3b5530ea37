"""The store: kills, damage, locks, a full disk, other settings; the list of failed problems."""

import hashlib
import os
import resource

import pytest

from rac_modifier.errors import RacError
from rac_modifier.traces import store as stores
from rac_modifier.traces.records import StoreHeader, encode
from rac_modifier.traces.store import FailedProblem, Trace, TraceCounts, TraceStore
from tests.traces.long_store import HEADER


def trace(i, finish="stop"):
    return Trace(
        f"p{i}#0", f"p{i}", (1, 2, 3), tuple(range(i + 1)), finish, 0, "1 + 1 = ? é\n", None
    )


def with_settings(**fields):
    return HEADER.model_copy(update={"sampling": HEADER.sampling.model_copy(update=fields)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "store.jsonl"


@pytest.fixture
def filled(path):
    with TraceStore.open_append(path, HEADER) as store:
        store.append_many([trace(0), trace(1, "length")])
        store.append_many([trace(2)])
    return path


def test_what_is_appended_is_read_back_in_order(filled):
    store = TraceStore.read(filled)
    assert list(store) == list(store) == [trace(0), trace(1, "length"), trace(2)]
    assert store.header == HEADER
    assert store.counts == TraceCounts(traces=3, prompt_tokens=9, completion_tokens=6, finished=2)
    assert store.counts.tokens == 15
    assert store.tokens_by_id == {"p0#0": 4, "p1#0": 5, "p2#0": 6}


def test_a_line_cut_anywhere_is_removed_and_only_that(filled):
    whole = filled.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (*range(last + 1, len(whole), 17), len(whole) - 1):
        filled.write_bytes(whole[:end])
        reader = TraceStore.read(
            filled
        )  # a reader leaves the file alone: its writer may still be at it
        assert [t.id for t in reader] == ["p0#0", "p1#0"]
        assert len(filled.read_bytes()) == end
        with TraceStore.open_append(filled, HEADER) as store:
            assert store.tokens_by_id.keys() == {"p0#0", "p1#0"}
            assert store.sha256() == reader.sha256()
            store.append_many([trace(2)])
        assert filled.read_bytes() == whole


def test_a_header_cut_anywhere_means_a_new_store(filled):
    whole = filled.read_bytes()
    for end in range(0, whole.index(b"\n") + 1, 23):
        filled.write_bytes(whole[:end])
        assert StoreHeader.read(filled) is None
        with TraceStore.open_append(filled, HEADER) as store:
            store.append_many([trace(0), trace(1, "length"), trace(2)])
        assert filled.read_bytes() == whole


def test_a_corrupt_line_is_named_with_the_way_out(filled):
    lines = filled.read_bytes().splitlines(keepends=True)
    filled.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(RacError, match=r"line 5 is corrupt: trace 'p0#0' is there twice"):
        TraceStore.read(filled)
    lines[2] = lines[2].replace(b"p1", b"p7")
    filled.write_bytes(b"".join(lines))
    with pytest.raises(RacError, match=r"store\.jsonl', line 3 is corrupt.*sed -i 3d"):
        TraceStore.open_append(filled, HEADER)
    filled.write_bytes(b"".join(lines[:2] + lines[3:]))  # the way out works
    assert TraceStore.read(filled).tokens_by_id.keys() == {"p0#0", "p2#0"}


def test_only_one_writer(filled, monkeypatch):
    monkeypatch.setattr(stores, "_PATIENCE", 0.0)
    with TraceStore.open_append(filled, HEADER):
        with pytest.raises(RacError, match="in use by another process"):
            TraceStore.open_append(filled, HEADER)
        assert len(TraceStore.read(filled)) == 3
    with pytest.raises(
        RacError, match=r"other settings \(sampling\.seed: 0 in the file, 1 asked for"
    ):
        TraceStore.open_append(filled, with_settings(seed=1))
    TraceStore.open_append(filled, HEADER).close()  # a failed open leaves no lock


def test_no_room_on_the_disk_keeps_what_was_stored(filled):
    before = filled.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with TraceStore.open_append(filled, HEADER) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(RacError, match=r"\(File too large\); the 3 traces stored before"):
                store.append_many([trace(3), trace(4)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert filled.read_bytes() == before
        assert "p3#0" not in store
        store.append_many([trace(3)])
    assert list(TraceStore.read(filled))[-1] == trace(3)


def test_files_that_are_no_store(tmp_path, filled):
    filled.write_bytes(encode("header", HEADER.model_copy(update={"version": 2})))
    with pytest.raises(RacError, match="no file of traces or answers of this version"):
        TraceStore.read(filled)
    with pytest.raises(RacError, match="does not exist or holds no header"):
        TraceStore.read(tmp_path / "none.jsonl")
    for text in ('{"problem": "x"}\n', "notes", '{"crc32":"00000000","header":{}}\n'):
        other = tmp_path / "other.jsonl"
        other.write_text(text)
        with pytest.raises(RacError, match="no file of traces or answers"):
            TraceStore.open_append(other, HEADER)
        assert other.read_text() == text
    with pytest.raises(RacError, match="no regular file is there"):
        TraceStore.open_append(tmp_path, HEADER)
    with pytest.raises(RacError, match=r"null byte.*name a file that can be written"):
        TraceStore.open_append("a\0b", HEADER)
    with pytest.raises(RacError, match="cannot be opened for writing"):
        TraceStore.open_append(tmp_path / "other.jsonl" / "below.jsonl", HEADER)


def test_what_never_ends_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        for opened in (TraceStore.read, lambda path: TraceStore.open_append(path, HEADER)):
            with pytest.raises(RacError, match="no regular file is there"):
                opened(tmp_path / name)


@pytest.mark.parametrize("place", ["header", "trace"])
def test_a_line_that_is_too_long_is_not_read_to_its_end(filled, monkeypatch, place):
    longest = len(filled.read_bytes().splitlines(keepends=True)[0])
    monkeypatch.setattr("rac_modifier.traces.records.LONGEST_LINE", longest)
    assert len(TraceStore.read(filled)) == 3
    if place == "header":
        filled.write_bytes(b'{"crc32":"' + b"0" * longest)
    else:
        with filled.open("ab") as file:
            file.write(b"0" * (longest + 1))
    for opened in (TraceStore.read, lambda path: TraceStore.open_append(path, HEADER)):
        with pytest.raises(RacError, match=rf"a line of it has more than {longest:,} bytes"):
            opened(filled)


def test_the_hash_is_of_what_was_read_also_when_another_process_appends(filled):
    reader = TraceStore.read(filled)
    before = reader.sha256()
    assert before == hashlib.sha256(filled.read_bytes()).hexdigest()
    with TraceStore.open_append(filled, HEADER) as writer:
        writer.append_many([trace(3)])
    assert reader.sha256() == before != TraceStore.read(filled).sha256()


def test_failures_come_back_and_a_torn_line_does_not(tmp_path):
    store = tmp_path / "s.jsonl"
    assert FailedProblem.read(store) == []
    first, second = FailedProblem("a#0", "1+1?", "why"), FailedProblem("b#0", "ü", "wegen")
    FailedProblem.append(store, [first])
    with FailedProblem.path(store).open("ab") as file:
        file.write(b'{"id": "x')
    assert FailedProblem.read(store) == [first]
    FailedProblem.append(store, [second])
    assert FailedProblem.read(store) == [first, second]
    FailedProblem.path(store).write_text("notes\n")
    with pytest.raises(RacError, match="not a list of failed problems"):
        FailedProblem.read(store)
