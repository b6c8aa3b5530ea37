from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rac_modifier.calibration.trace_pool import HoldOut, TracePool
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.records import StoreHeader, Trace
from rac_modifier.traces.store import TraceStore
from tests.tiny import byte_tokenizer

HEADER = StoreHeader(
    fingerprint="f" * 64,
    model="tiny",
    tokenizer="t" * 64,
    sampling=SamplingSettings().resolved(None),
    problems=ProblemSource(),
)


def trace(problem: str, sample: int = 0, length: int = 10, answer: str | None = None) -> Trace:
    number = 10 + int(problem)
    return Trace(
        f"{problem}#{sample}",
        problem,
        (1, 1, 1, number),
        (number,) * (length - 4),
        "stop",
        0,
        "?",
        answer,
    )


def split(traces: list[Trace], tokens: int) -> tuple[list[Trace], list[Trace]]:
    hold_out = HoldOut(tokens)
    others = list(hold_out.others(traces))
    return hold_out.held, others


def ids(traces: list[Trace]) -> list[str]:
    return [t.id for t in traces]


def test_the_first_traces_up_to_the_tokens():
    traces = [trace(str(i)) for i in range(10)]
    held, others = split(traces, 55)
    assert ids(held) == ["0#0", "1#0", "2#0", "3#0", "4#0", "5#0"]
    assert ids(held) + ids(others) == ids(traces)


def test_all_samples_of_a_held_out_problem_go_with_it():
    traces = [trace(str(i), sample, length=50) for i in range(6) for sample in range(2)]
    held, others = split([*traces, trace("0", 2)], 100)
    assert {t.problem_id for t in held} == {"0", "1", "2", "3"}
    assert not {t.problem_id for t in held} & {t.problem_id for t in others}
    assert len(held) == 9


def test_the_same_question_in_two_rows_lies_on_one_side():
    """Told by the ids of the prompt: rows of a data set that repeat a question have other ids."""
    traces = [trace(str(i)) for i in range(8)]
    again = [
        replace(one, id=f"again{one.id}", problem_id=f"again{one.problem_id}") for one in traces
    ]
    held, others = split([*traces, *again], 40)
    assert ids(held) == ["0#0", "1#0", "2#0", "3#0", "again0#0", "again1#0", "again2#0", "again3#0"]
    assert not {t.prompt_ids for t in held} & {t.prompt_ids for t in others}


def test_a_growing_store_holds_out_the_same():
    traces = [trace(str(i)) for i in range(30)]
    assert split(traces, 80)[0] == split(traces[:12], 80)[0]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def pool_of(tmp_path: Path, tokenizer: Any) -> Any:
    def pool_of(
        traces: list[Trace],
        select: dict[str, Any] | None = None,
        held_out_tokens: int = 0,
        **calibration: Any,
    ) -> TracePool:
        path = tmp_path / "store.jsonl"
        if not path.exists():
            with TraceStore.open_append(path, HEADER) as store:
                store.append_many(traces)
        settings = CalibrationSettings(held_out_tokens=0).model_copy(update=calibration)
        return TracePool(
            TraceStore.read(path),
            SelectSettings(**(select or {})),
            Judge(tokenizer, HEADER),
            tokenizer,
            settings,
            held_out_tokens,
        )

    return pool_of


def test_the_pool_counts_what_the_selection_keeps_and_what_is_held_out(pool_of):
    traces = [trace(str(i), length=10 + i) for i in range(20)]
    pool = pool_of(traces, {"max_tokens": 12}, held_out_tokens=30)
    assert [t.id for t in pool.held_out] == ["0#0", "1#0", "2#0", "3#0"]
    assert pool.kept_out_tokens == 10 + 11 + 12 + 13
    assert list(pool.lengths) == [14, 15, 16]  # completions of 10, 11 and 12 tokens
    assert (pool.selection.kept, pool.selection.total) == (3, 16)
    assert pool.usable_tokens() == 45
    assert pool_of(traces, {"max_tokens": 12}, 30, max_sequence_tokens=15).usable_tokens() == 44


def test_repeated_tails_are_cut_from_what_is_held_out_reserved_and_drawn(pool_of):
    def looping(number: int) -> Trace:
        ids = (*range(20), *(number, number + 1) * 40)
        return Trace(f"{number}#0", str(number), (1, 1, 1, number), ids, "length", 0, "?", None)

    traces = [looping(100 + number) for number in range(20)]
    pool = pool_of(traces, {"max_tokens": 30}, held_out_tokens=30)
    assert pool.repeated_tokens == 20 * 78
    assert [t.completion_ids for t in pool.held_out] == [t.completion_ids[:22] for t in traces[:4]]
    assert pool.usable_tokens() == 16 * 26
    assert {len(s.ids) for s in pool.draw("traces", 1000)} == {26}
    assert not any(s.finished for s in pool.draw("traces", 1000))


def test_a_draw_is_as_many_whole_traces_as_make_up_the_tokens(pool_of):
    traces = [trace(str(i)) for i in range(50)]
    pool = pool_of(traces)
    drawn = pool.draw("traces", 95)
    assert len(drawn) == 10
    assert len({s.ids for s in drawn}) == 10
    whole = {(*t.prompt_ids, *t.completion_ids) for t in traces}
    assert {s.ids for s in drawn} <= whole
    assert {s.prompt_tokens for s in drawn} == {4}
    assert len(pool.draw("traces", 90)) == 9
    assert {s.ids for s in pool.draw("traces", 10_000)} == whole  # all there is
    assert pool.draw("traces", 0) == []


def test_the_seed_and_the_part_decide_the_draw_and_a_longer_draw_begins_with_a_shorter_one(pool_of):
    traces = [trace(str(i)) for i in range(50)]
    drawn = pool_of(traces).draw("traces", 100)
    assert drawn == pool_of(traces).draw("traces", 100)
    assert drawn == pool_of(traces).draw("traces", 200)[:10]
    front = {(*t.prompt_ids, *t.completion_ids) for t in traces[:10]}
    others = [pool_of(traces, seed=1).draw("traces", 100), pool_of(traces).draw("traces:math", 100)]
    for other in [drawn, *others]:
        assert {s.ids for s in other} != front
    assert len({tuple(s.ids for s in one) for one in [drawn, *others]}) == 3


def test_inverse_length_gives_each_trace_the_same_total_weight(pool_of):
    drawn = pool_of(
        [trace(str(i), length=10 + 3 * i) for i in range(8)], trace_weighting="inverse_length"
    ).draw("traces", 10_000)
    totals = [s.weight * len(s.ids) for s in drawn]
    assert max(totals) == pytest.approx(min(totals))
    assert sum(totals) == pytest.approx(sum(len(s.ids) for s in drawn))  # a mean of 1 per token


def test_a_function_weighs_traces(pool_of):
    traces = [trace(str(i)) for i in range(8)]
    drawn = pool_of(traces, trace_weighting=lambda t: 3 if t.id == "5#0" else 1).draw(
        "traces", 10_000
    )
    weights = {s.ids[-1] - 10: s.weight for s in drawn}
    assert weights[5] == pytest.approx(3 * weights[0])
    assert sum(weights.values()) == pytest.approx(8)


def test_traces_that_all_weigh_nothing_are_refused(pool_of):
    traces = [trace(str(i), answer="1") for i in range(8)]  # no completion holds an answer
    with pytest.raises(RacError, match="every trace of the calibration set weighs 0"):
        pool_of(traces, trace_weighting="correct").draw("traces", 100)


def test_the_answer_begins_behind_the_thinking_and_is_looked_up_only_when_weighed(
    pool_of, tokenizer
):
    end = tokenizer.encode("</think>", add_special_tokens=False)
    traces = [
        Trace(f"{i}#0", str(i), (1,) * 4, (9,) * i + (*end, 7, 7), "stop", 0, "?", None)
        for i in range(1, 4)
    ]
    assert {s.answer_start for s in pool_of(traces).draw("traces", 100)} == {None}
    drawn = pool_of(traces, answer_weight=2.0).draw("traces", 100)
    assert {len(s.ids) - s.answer_start for s in drawn} == {2}
