from rac_modifier.calibration.held_out import HoldOut
from rac_modifier.traces.records import Trace


def trace(problem: str, sample: int = 0, length: int = 10) -> Trace:
    return Trace(f"{problem}#{sample}", problem, (1,) * 4, (2,) * (length - 4), "stop", 0, "?", None)


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


def test_four_problems_at_least():
    held, _ = split([trace(str(i), length=100) for i in range(10)], 50)
    assert len(held) == 4


def test_all_samples_of_a_held_out_problem_go_with_it():
    traces = [trace(str(i), sample, length=50) for i in range(6) for sample in range(2)]
    held, others = split([*traces, trace("0", 2)], 100)
    assert {t.problem_id for t in held} == {"0", "1", "2", "3"}
    assert not {t.problem_id for t in held} & {t.problem_id for t in others}
    assert len(held) == 9


def test_a_growing_store_holds_out_the_same():
    traces = [trace(str(i)) for i in range(30)]
    assert split(traces, 80)[0] == split(traces[:12], 80)[0]


def test_nothing_is_held_out_when_not_wanted():
    traces = [trace(str(i)) for i in range(3)]
    assert split(traces, 0) == ([], traces)
