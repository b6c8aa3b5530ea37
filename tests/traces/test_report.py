"""A store in words."""

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.report import describe_store, describe_verified, read_select
from rac_modifier.traces.store import StoreHeader, Trace, TraceStore
from tests.tiny import byte_tokenizer

HEADER = StoreHeader(
    fingerprint="f" * 64,
    model="tiny",
    tokenizer="t" * 64,
    chat_template="abc",
    sampling=SamplingSettings().resolved(None),
    problems=ProblemSource(),
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def trace(tokenizer, i):
    text = "12 " * (i % 40) + f"</think>\\boxed{{{i if i % 4 else 'x'}}}"
    ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return Trace(
        f"p{i}#0", f"p{i}", (3, 4), ids, "stop" if i % 3 else "length", 0, f"{i} é?", None if i == 4 else str(i)
    )


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "s.jsonl"
    with TraceStore.open_append(path, HEADER) as opened:
        opened.append_many([trace(tokenizer, i) for i in range(2500) if i != 4])
    return TraceStore.read(path)


def test_a_store_in_words(store):
    text = describe_store(store)
    assert "chat template abc, generation prompt added, thinking on, no system prompt" in text
    assert "ended by    stop 1,665, length 834" in text
    bars = [line.split() for line in text.splitlines() if line.startswith("  from")]
    assert sum(int(count.replace(",", "")) for _, _, count, _ in bars) == len(store)
    assert [int(low) for _, low, _, _ in bars] == sorted(int(low) for _, low, _, _ in bars)


def test_what_is_right_and_what_a_selection_keeps(store, tokenizer):
    text = describe_verified(store, tokenizer, True, SelectSettings(answers="correct", finished=True))
    right = [t for t in store if int(t.answer) % 4]
    assert f"verified    {len(right):,} of 2,499 right" in text
    kept = [t for t in right if t.finish_reason == "stop"]
    assert f"selection   kept {len(kept):,} of 2,499: 834 unfinished, {2499 - 834 - len(kept)} wrong" in text
    assert f"{sum(t.tokens for t in kept):,} tokens" in text


def test_a_selection_on_the_command_line():
    assert read_select(None) is None
    assert read_select("{answers: wrong, max_tokens: 9}") == SelectSettings(answers="wrong", max_tokens=9)
    for text in ("correct", "{answers: [", "[1]", "{answer: correct}", "{max_tokens: 0}"):
        with pytest.raises(RacError, match="--select"):
            read_select(text)
