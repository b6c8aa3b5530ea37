"""A store in words."""

from statistics import median

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import describe_store, read_select, selected_figures
from rac_modifier.traces.store import TraceStore


def test_a_store_in_words(long_store):
    text = describe_store(long_store)
    assert "chat template abc, no system prompt, thinking on" in text
    assert "ended by    stop 332, length 167" in text
    lengths = [len(t.completion_ids) for t in long_store]
    assert f"{median(lengths):,} tokens (median), {max(lengths):,} (longest)" in text


def test_cut_traces_that_repeat_themselves_are_counted(tmp_path, long_store):
    ends = [((5, 6) * 50, "length"), ((5, 6) * 50, "stop"), (tuple(range(100)), "length")]
    traces = [
        Trace(f"{i}#0", f"{i}", (1,) * 4, ids, end, 0, "?", None)
        for i, (ids, end) in enumerate(ends)
    ]
    with TraceStore.open_append(tmp_path / "s.jsonl", long_store.header) as store:
        store.append_many(traces)
    text = describe_store(store)
    assert "repeating   1 that were cut end in repetitions, 98 tokens" in text
    assert "repeating" not in describe_store(long_store)
    figures = selected_figures(store, None, SelectSettings())
    assert figures["selected_tokens"] == 3 * 104 - 98


def test_what_a_selection_keeps(long_store, byte_tokenizer):
    selection = SelectSettings(answers="correct", finished=True)
    figures = selected_figures(long_store, byte_tokenizer, selection)
    right = [t for t in long_store if int(t.answer) % 4]
    selected = [t for t in right if t.finish_reason == "stop"]
    assert figures["selected"] == len(selected)
    wrong = 499 - 167 - len(selected)
    text = f"kept {len(selected):,} of 499: 167 unfinished, {wrong} wrong"
    assert figures["selection"] == text
    assert figures["selected_tokens"] == sum(t.tokens for t in selected)


def test_a_selection_on_the_command_line():
    assert read_select(None) is None
    assert read_select("{answers: correct, max_tokens: 9}") == SelectSettings(
        answers="correct", max_tokens=9
    )
    for text in ("correct", "{answers: [", "[1]", "{max_tokens: 0}"):
        with pytest.raises(RacError, match="--select"):
            read_select(text)
    with pytest.raises(RacError, match=r"--select '.*': answer: .* did you mean answers\?"):
        read_select("{answer: correct}")
