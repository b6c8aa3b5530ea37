"""The lines of a store: what they hold, and that a damaged one is noticed."""

import json
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.settings.problems import ProblemSource
from rac_modifier.traces.records import Trace, decode, encode
from tests.traces.long_store import HEADER


def trace(i):
    return Trace(
        f"p{i}#0", f"p{i}", (1, 2, 3), tuple(range(i + 1)), "stop", 0, "1 + 1 = ? é\n", None
    )


def test_a_line_is_a_json_object_with_the_checksum_of_its_value():
    """As bytes, since stores that exist must stay readable."""
    payload = (
        '{"id":"p1#0","problem_id":"p1","prompt_ids":[1,2,3],"completion_ids":[0,1],"finish_reason":"stop","seed":0,'
        '"question":"1 + 1 = ? é\\n","answer":null}'
    ).encode()
    line = b'{"crc32":"%08x","trace":%s}\n' % (zlib.crc32(payload), payload)
    assert encode("trace", trace(1)) == line
    assert list(json.loads(line)) == ["crc32", "trace"]
    assert Trace.of(decode("trace", line[:-1])) == trace(1)


IDS = st.lists(st.integers(0, 2**31)).map(tuple)


@given(st.builds(Trace, st.text(), st.text(), IDS, IDS, st.just("stop"), st.integers(), st.text(),
                 st.none() | st.text()))  # fmt: skip
@settings(max_examples=60)
def test_any_trace_survives_its_line(one):
    line = encode("trace", one)
    assert line.count(b"\n") == 1
    assert Trace.of(decode("trace", line[:-1])) == one


@given(st.data())
@settings(max_examples=200)
def test_any_changed_byte_is_noticed(data):
    line = bytearray(encode("trace", trace(5))[:-1])
    line[data.draw(st.integers(0, len(line) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):  # noqa: PT011
        Trace.of(decode("trace", bytes(line)))


FIELDS = json.loads(encode("trace", trace(1)))["trace"]


@pytest.mark.parametrize(
    "value",
    [
        [1],
        {"id": "a"},
        {**FIELDS, "prompt_ids": [[1]]},
        {**FIELDS, "completion_ids": [-1]},
        {**FIELDS, "finish_reason": "abort"},
        {**FIELDS, "extra": 1},
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_trace(value):
    text = value if isinstance(value, str) else json.dumps(value)
    line = f'{{"crc32":"{zlib.crc32(text.encode()):08x}","trace":{text}}}'.encode()
    with pytest.raises(ValueError, match=r"an object|not the fields of a trace|nested too deeply"):
        Trace.of(decode("trace", line))


def test_what_keeps_two_runs_from_sharing_a_store():
    assert HEADER.differences(HEADER.model_copy(update={"model": "copy"})) == []
    other = HEADER.model_copy(
        update={
            "fingerprint": "0" * 64,
            "sampling": HEADER.sampling.model_copy(update={"seed": 1, "batch_size": 7}),
            "problems": ProblemSource(source="a.jsonl", limit=5),
        }
    )
    assert HEADER.differences(other) == [
        f"fingerprint: '{'f' * 56}... in the file, '{'0' * 56}... asked for",
        "sampling.seed: 0 in the file, 1 asked for",
        "problems.source: 'arithmetic' in the file, 'a.jsonl' asked for",
    ]
