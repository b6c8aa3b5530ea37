import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.calibration import mixture as module
from rac_modifier.calibration.mixture import (
    CalibrationSequence,
    generic_token_sequences,
    mix,
)
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import KINDS, CalibrationSettings, GenericText


def trace(
    i: int, prompt: int = 3, completion: int = 7, finished: bool = True
) -> CalibrationSequence:
    ids = ((1,) * prompt) + (1000 + i,) * completion
    return CalibrationSequence(ids, prompt, "traces", finished)


def sequence(ids: list[int], kind: str = "prompts") -> CalibrationSequence:
    return CalibrationSequence(tuple(ids), len(ids), kind)


def candidates(count: int = 60) -> dict[str, list[CalibrationSequence]]:
    return {
        "traces": [trace(i) for i in range(count)],
        "prompts": [sequence([2000 + i] * 4) for i in range(count)],
        "generic": [sequence([3000 + i] * 16, "generic") for i in range(count)],
    }


def settings(**changes) -> CalibrationSettings:
    return CalibrationSettings(**{"tokens": 100, **changes})


def tokens_by_kind(sequences: list[CalibrationSequence]) -> dict[str, int]:
    return {kind: sum(len(s.ids) for s in sequences if s.kind == kind) for kind in KINDS}


def test_a_mixture_is_exact_to_the_token_in_each_kind():
    chosen, counts = mix(
        candidates(), settings(mixture={"traces": 0.5, "prompts": 0.2, "generic": 0.3})
    )
    assert tokens_by_kind(chosen) == {"traces": 50, "prompts": 20, "generic": 30}
    assert counts["tokens"] == 100
    assert counts["generic_tokens"] == 30
    assert counts["trace_tokens"] == 5 * 7
    assert counts["prompt_tokens"] == 5 * 3 + 20
    assert counts["sequences"] == len(chosen) == 5 + 5 + 2
    assert counts["parts"] == {
        "traces": {"tokens": 50, "sequences": 5},
        "prompts": {"tokens": 20, "sequences": 5},
        "generic": {"tokens": 30, "sequences": 2},
    }


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    tokens=st.integers(1, 300),
    share=st.floats(0, 1),
    longest=st.none() | st.integers(16, 50),
)
def test_the_budget_is_met_exactly_or_refused(lengths, tokens, share, longest):
    pools = {
        "traces": [trace(i, 0, n) for i, n in enumerate(lengths)],
        "prompts": [sequence([5] * n) for n in lengths],
    }
    wanted = settings(
        tokens=tokens, mixture={"traces": share, "prompts": 1 - share}, max_sequence_tokens=longest
    )
    most = {
        kind: sum(min(len(s.ids), longest or 10**9) for s in pool) for kind, pool in pools.items()
    }
    budgets = {"traces": round(tokens * share) if share < 1 else tokens}
    budgets["prompts"] = tokens - budgets["traces"]
    if any(most[kind] < budget for kind, budget in budgets.items() if wanted.mixture.get(kind)):
        with pytest.raises(RacError, match=r"part .* has .* and .* lower calibration\.tokens"):
            mix(pools, wanted)
        return
    if not budgets["traces"] and wanted.mixture.get("traces"):
        with pytest.raises(RacError, match="no token of a chain"):
            mix(pools, wanted)
        return
    chosen, counts = mix(pools, wanted)
    assert sum(len(s.ids) for s in chosen) == counts["tokens"] == tokens
    assert abs(tokens_by_kind(chosen)["traces"] - tokens * share) <= 1
    if longest:
        assert max(len(s.ids) for s in chosen) <= longest


def test_the_seed_decides_the_order_of_the_whole_set():
    def run(seed: int) -> list[CalibrationSequence]:
        return mix(candidates(), settings(seed=seed, mixture={"traces": 0.5, "generic": 0.5}))[0]

    assert run(0) == run(0)
    assert run(0) != run(1)
    assert sorted(s.ids for s in run(0)) == sorted(s.ids for s in run(1))
    kinds = [s.kind for s in run(0)]
    assert kinds not in (sorted(kinds), sorted(kinds, reverse=True))


def test_a_part_is_read_in_its_order_and_only_as_far_as_needed():
    read = []

    def endless():
        i = 0
        while True:
            read.append(i)
            yield sequence([i] * 4)
            i += 1

    chosen, _ = mix({"prompts": endless()}, settings(tokens=20, mixture={"prompts": 1.0}))
    assert sorted(s.ids[0] for s in chosen) == [0, 1, 2, 3, 4]
    assert len(read) <= 6


def test_truncated_and_unfinished_are_counted():
    pool = {"traces": [trace(i, 3, 7, i >= 2) for i in range(5)]}
    _, counts = mix(pool, settings(tokens=45))
    assert counts["unfinished_traces"] == 2
    assert counts["truncated_sequences"] == 1  # the last one, to meet the budget
    pool = {"traces": [trace(i, 12, 30) for i in range(5)]}
    _, counts = mix(pool, settings(tokens=80, max_sequence_tokens=16))
    assert counts["truncated_sequences"] == 5
    assert counts["unfinished_traces"] == 0  # cut by us, not by the sampling cap
    assert (counts["prompt_tokens"], counts["trace_tokens"]) == (60, 20)
    cut = trace(0, 3, 7).cut(2)  # inside a prompt
    assert (cut.ids, cut.prompt_tokens, cut.finished) == ((1, 1), 2, False)


def test_a_set_without_any_trace_token_is_not_called_reasoning_aware():
    prompts_alone = {"traces": [trace(i, 20, 7) for i in range(9)]}
    with pytest.raises(RacError, match="no token of a chain"):
        mix(prompts_alone, settings(max_sequence_tokens=16))


TEXTS = [f"document {i} " + "words " * 10 for i in range(8)]


def read(tokenizer, seed=0, **source):
    return list(generic_token_sequences(tokenizer, GenericText(sequence_tokens=32, **source), seed))


def test_pythons_documentation_needs_no_download(tokenizer):
    text = GenericText(sequence_tokens=32)
    first, other = (
        list(islice(generic_token_sequences(tokenizer, text, seed), 101)) for seed in (0, 1)
    )
    assert [len(sequence) for sequence in first] == [32] * 101
    assert first != other


def test_text_of_a_file_is_cut_into_sequences(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    sequences = read(tokenizer, source=str(tmp_path / "t.jsonl"), column="body")
    assert len(sequences) == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS) // 32
    (tmp_path / "t.txt").write_text("".join(TEXTS))
    whole = tokenizer("".join(TEXTS))["input_ids"]
    text = GenericText(source=str(tmp_path / "t.txt"), sequence_tokens=len(whole))
    assert list(generic_token_sequences(tokenizer, text, 0)) == [whole]
    ids = [i for sequence in read(tokenizer, source=str(tmp_path / "t.txt")) for i in sequence]
    assert ids == whole[: len(ids)]


@pytest.mark.parametrize("buffer", [3, 100])
def test_each_document_is_read_once_in_an_order_of_the_seed(
    tokenizer, tmp_path, monkeypatch, buffer
):
    monkeypatch.setattr(module, "_BUFFER", buffer)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    text = GenericText(
        source=str(tmp_path / "t.jsonl"), column="body", sequence_tokens=len(documents[0])
    )
    orders = [list(generic_token_sequences(tokenizer, text, seed)) for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(documents)
    assert documents != orders[0] != orders[1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"source": "none.txt"}, "no such file"),
        ({"source": "t.jsonl"}, "needs the name of its text column"),
        (
            {"source": "t.jsonl", "column": "body"},
            "row 1 has no text in column 'body'; its columns are text",
        ),
        ({"source": "empty.jsonl", "column": "text"}, "is empty"),
        ({"source": "bad.jsonl", "column": "text"}, "one JSON object per line"),
    ],
)
def test_what_cannot_be_read_is_refused(tokenizer, tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "some words"}\nnot json\n')
    with pytest.raises(RacError, match=message):
        read(tokenizer, **source)
