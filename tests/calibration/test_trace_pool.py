"""Which traces are held out, what a draw takes, and how long is collected."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rac_modifier.calibration import trace_pool
from rac_modifier.calibration.trace_pool import TracePool, _hold_out, collect_for_calibration
from rac_modifier.errors import RacError
from rac_modifier.runtime import models as model_tools
from rac_modifier.settings.calibration import CalibrationSettings, SelectSettings, TraceSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Judge
from rac_modifier.traces.store import TraceStore
from tests.tiny import byte_tokenizer, entry
from tests.traces.long_store import HEADER

SAMPLING = {"temperature": 1.0, "max_new_tokens": 20, "batch_size": 16}


def trace(problem: str, sample: int = 0, length: int = 10, answer: str | None = None) -> Trace:
    number = 10 + int(problem)
    prompt, completion = (1, 1, 1, number), (number,) * (length - 4)
    return Trace(f"{problem}#{sample}", problem, prompt, completion, "stop", 0, "?", answer)


def split(traces: list[Trace], tokens: int) -> tuple[list[Trace], list[Trace]]:
    held: list[Trace] = []
    others = list(_hold_out(traces, tokens, held))
    return held, others


def ids(traces: list[Trace]) -> list[str]:
    return [t.id for t in traces]


def test_the_first_prompts_are_held_out_with_all_their_samples():
    """The same ones of a store that has grown."""
    traces = [trace(str(i)) for i in range(10)]
    held, others = split(traces, 55)
    assert ids(held) == ["0#0", "1#0", "2#0", "3#0", "4#0", "5#0"]
    assert split(traces, 51)[0] == split(traces, 60)[0] == held
    assert ids(held) + ids(others) == ids(traces)
    assert split(traces[:7], 55)[0] == held
    samples = [trace(str(i), sample, length=50) for i in range(6) for sample in range(2)]
    held, others = split([*samples, trace("0", 2)], 100)
    assert {t.problem_id for t in held} == {"0", "1", "2", "3"}
    assert not {t.problem_id for t in held} & {t.problem_id for t in others}
    assert len(held) == 9


def test_the_same_question_in_two_rows_lies_on_one_side():
    """Told by the ids of the prompt: rows of a data set that repeat a question have other ids."""
    traces = [trace(str(i)) for i in range(8)]
    again = [replace(t, id=f"again{t.id}", problem_id=f"again{t.problem_id}") for t in traces]
    held, others = split([*traces, *again], 40)
    assert ids(held) == ["0#0", "1#0", "2#0", "3#0", "again0#0", "again1#0", "again2#0", "again3#0"]
    assert not {t.prompt_ids for t in held} & {t.prompt_ids for t in others}


@pytest.fixture
def pool_of(tmp_path):
    def pool_of(traces, select=None, held_out_tokens=0, reserved_tokens=0, **calibration):
        path = tmp_path / "store.jsonl"
        if not path.exists():
            with TraceStore.open_append(path, HEADER) as store:
                store.append_many(traces)
        settings = CalibrationSettings(held_out_tokens=0).model_copy(update=calibration)
        judge, store = Judge(byte_tokenizer(), HEADER), TraceStore.read(path)
        selection = SelectSettings(**(select or {}))
        return TracePool(store, selection, judge, settings, held_out_tokens, reserved_tokens)

    return pool_of


def test_the_pool_counts_what_the_selection_keeps_and_what_is_held_out(pool_of):
    traces = [trace(str(i), length=10 + i) for i in range(20)]
    pool = pool_of(traces, {"max_tokens": 12}, held_out_tokens=30)
    assert [t.id for t in pool.held_out] == ["0#0", "1#0", "2#0", "3#0"]
    assert pool.kept_out_tokens == 10 + 11 + 12 + 13
    assert list(pool.lengths.values()) == [14, 15, 16]  # completions of 10, 11 and 12 tokens
    assert (pool.selection.kept, pool.selection.total) == (3, 16)
    assert pool.usable_tokens() == 45
    assert pool_of(traces, {"max_tokens": 12}, 30, max_sequence_tokens=15).usable_tokens() == 44


def test_repeated_tails_are_cut_from_what_is_held_out_and_drawn_not_from_what_is_reserved(pool_of):
    def looping(number: int) -> Trace:
        ids = (*range(20), *(number, number + 1) * 40)
        return Trace(f"{number}#0", str(number), (1, 1, 1, number), ids, "length", 0, "?", None)

    traces = [looping(100 + number) for number in range(20)]
    pool = pool_of(traces, {"max_tokens": 30}, held_out_tokens=30, reserved_tokens=30)
    assert pool.repeated_tokens == 20 * 78
    assert [t.completion_ids for t in pool.reserved] == [t.completion_ids for t in traces[4:8]]
    assert [t.completion_ids for t in pool.held_out] == [t.completion_ids[:22] for t in traces[:4]]
    assert pool.usable_tokens() == 12 * 26
    assert {len(s.ids) for s in pool.draw("traces", 1000)} == {26}
    assert not any(s.finished for s in pool.draw("traces", 1000))


def test_a_draw_is_as_many_whole_traces_as_make_up_the_tokens(pool_of):
    traces = [trace(str(i)) for i in range(50)]
    pool = pool_of(traces)
    drawn = pool.draw("traces", 91)
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
    assert len({tuple(s.ids for s in sequences) for sequences in [drawn, *others]}) == 3


@pytest.fixture
def collect(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where stores are written by default

    def collect(traces, reserved=0, **calibration):
        settings = CalibrationSettings(**{"tokens": 600, "held_out_tokens": 0, **calibration})
        traces = TraceSettings(**{"sampling": SAMPLING, **traces})
        return collect_for_calibration(model, tokenizer, traces, settings, reserved)

    return collect


def test_a_store_that_holds_exactly_enough_is_only_read(collect, trace_store, tmp_path):
    (tmp_path / "exact.jsonl").write_bytes(trace_store.read_bytes())
    settings = {**entry(tmp_path / "exact.jsonl")["traces"]}
    pool = collect(settings, tokens=TraceStore.read(trace_store).counts.tokens)["traces"]
    assert pool.usable_tokens() == TraceStore.read(trace_store).counts.tokens
    assert pool.store.path.read_bytes() == trace_store.read_bytes()


@pytest.fixture
def small_accelerator(model, monkeypatch):
    """An accelerator that the model does not fit on, and that it must not be moved to."""
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(type(model), "to", lambda self, device: pytest.fail(f"moved to {device}"))


@pytest.mark.usefixtures("small_accelerator")
def test_a_model_is_not_moved_where_the_store_holds_enough(collect, trace_store):
    assert collect(entry(trace_store)["traces"], tokens=300)["traces"].usable_tokens() >= 300


@pytest.mark.usefixtures("small_accelerator")
def test_a_model_that_does_not_fit_is_refused_before_it_samples(collect, trace_store, tmp_path):
    for content in (None, trace_store.read_bytes()):
        path = tmp_path / f"{content is None}.jsonl"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RacError, match=r"are free on cuda, .*: fill the trace store .*--serve"):
            collect(entry(path)["traces"], tokens=10**5)
        assert (path.read_bytes() if path.exists() else None) == content


def test_traces_are_held_out_and_reserved_of_each_part_next_to_its_share(collect):
    """Each part has a store of its own."""
    mixture = {"traces:arithmetic": 0.5, "traces:reasoning-gym:gcd": 0.5}
    pools = collect({}, 600, mixture=mixture, held_out_tokens=400)
    assert len({pool.store.path for pool in pools.values()}) == 2
    for pool in pools.values():
        assert pool.usable_tokens() < 600
        assert len(pool.held_out) >= 4
        held_out, reserved = (sum(t.tokens for t in t) for t in (pool.held_out, pool.reserved))
        assert held_out >= 200
        assert 300 <= reserved < 600
        assert pool.usable_tokens() >= 300
        assert pool.selection.total == len(pool.store) - len(pool.held_out) - len(pool.reserved)
    of_another = {"mixture": {"traces:arithmetic": 1}, "tokens": 60, "held_out_tokens": 400}
    (pool,) = collect({"allow_off_policy": True}, **of_another).values()
    assert pool.held_out == (), "KL is measured on traces of the dense model"


def test_an_unknown_name_is_refused_before_anything_is_sampled(collect, tmp_path):
    with pytest.raises(RacError, match="traces:maths, which is not among"):
        collect({}, mixture={"traces": 0.5, "traces:maths": 0.5})
    assert not (tmp_path / "rac_traces").exists()
    with pytest.raises(RacError, match="gives traces no share: nothing to collect"):
        collect({}, mixture={"prompts": 1})


def test_collection_continues_until_what_is_selected_fills_the_budget(collect):
    pool = collect({"store": "s.jsonl", "select": {"max_tokens": 11}}, tokens=600)["traces"]
    held = list(TraceStore.read("s.jsonl"))
    fit = [t for t in held if len(t.completion_ids) <= 11]
    assert sum(t.tokens for t in fit) == sum(pool.lengths.values()) >= 600
    assert 0 < len(fit) < len(held)
    assert pool.selection.as_dict() == {
        "kept": len(fit), "of": len(held), "dropped": {"too long": len(held) - len(fit)},
    }  # fmt: skip


def test_collection_continues_until_the_budget_is_met_as_traces_will_be_cut(collect):
    pool = collect({"store": "s.jsonl"}, tokens=400, max_sequence_tokens=16)["traces"]
    assert pool.usable_tokens() == sum(min(t.tokens, 16) for t in pool.store) >= 400
    assert pool.store.counts.tokens > 400
    assert pool.usable_tokens() < 400 + 16 * 16  # and little more: at most one batch


@pytest.mark.parametrize(
    ("sampled", "repeated", "kept_out", "usable", "expected"),
    [
        (150, 50, 98, 2, 200),  # two thirds are usable: (100 kept out + 33 wanted) / (2 / 3)
        (90, 30, 60, 0, 200),  # nothing is left over yet, and less is kept out than wanted
        (1100, 0, 100, 20, 1750),  # a fiftieth is usable, so 33 need 1,650 of the others
        (1100, 0, 100, 2, 4100),  # at most four times as many others in one round
        (300, 0, 100, 20, 430),
    ],
)
def test_a_store_grows_by_what_is_usable_of_it(sampled, repeated, kept_out, usable, expected):
    pool = SimpleNamespace(
        store=SimpleNamespace(counts=SimpleNamespace(tokens=sampled)),
        repeated_tokens=repeated,
        kept_out_tokens=kept_out,
        usable_tokens=lambda: usable,
    )
    assert trace_pool._store_tokens(pool, 33, 100) == pytest.approx(expected, abs=1)


def test_a_selection_that_keeps_nothing_ends_with_an_error(collect, monkeypatch):
    monkeypatch.setattr(trace_pool, "_ENOUGH_TO_JUDGE", 32)
    with pytest.raises(RacError, match=r"traces\.select kept 0 of .* wrong.*loosen the selection"):
        collect({"select": {"answers": "correct"}}, tokens=300)


@pytest.mark.parametrize(
    ("judged", "tokens", "refused"), [(255, 0, False), (256, 19, True), (256, 20, False)]
)
def test_a_selection_of_less_than_a_fiftieth_of_256_traces_is_refused(
    monkeypatch, judged, tokens, refused
):
    store, usable = SimpleNamespace(header=HEADER, counts=SimpleNamespace(tokens=1500)), [99, 9]
    pool = SimpleNamespace(
        store=store,
        selection=SimpleNamespace(kept=judged, total=judged, describe=lambda: "kept few"),
        lengths={"0#0": tokens},
        usable_tokens=lambda: usable.pop(),
        kept_out_tokens=500,
        repeated_tokens=0,
    )
    monkeypatch.setattr(trace_pool, "collect_traces", lambda *args, **options: store)
    monkeypatch.setattr(trace_pool, "TracePool", lambda *args: pool)
    monkeypatch.setattr(trace_pool, "_store_tokens", lambda *args: 2000)
    settings = TraceSettings(), CalibrationSettings(tokens=99, held_out_tokens=0)
    if refused:
        with pytest.raises(RacError, match=r"kept few, 1\.9% of the tokens sampled"):
            collect_for_calibration(None, byte_tokenizer(), *settings)
        return
    assert collect_for_calibration(None, byte_tokenizer(), *settings) == {"traces": pool}
    assert not usable, "a second round"


def test_answers_are_selected_only_if_their_column_is_named_before_anything_is_sampled(monkeypatch):
    monkeypatch.setattr(trace_pool, "collect_traces", None)
    source = {"problems": {"source": "p.jsonl"}, "select": {"answers": "correct"}}
    calibration = CalibrationSettings(mixture={"traces:p": 1})
    traces = TraceSettings(sources={"p": source})
    with pytest.raises(RacError, match=r"needs reference answers; .* 'p\.jsonl' \(pro"):
        collect_for_calibration(None, byte_tokenizer(), traces, calibration)


def test_problems_that_end_before_a_selection_is_met_say_so(collect):
    traces = {"select": {"answers": "correct"}, "problems": {"limit": 20}}
    with pytest.raises(RacError, match=r"used up.* kept 0 of \d+: \d+ wrong, 0 of 300 are left"):
        collect(traces, tokens=300)


def test_the_budget_that_an_error_names_works_and_checking_says_what_is_needed(collect, tokenizer):
    """Held-out traces and tails that repeat count: the tokens of a store are more than fit."""
    traces = {"store": "s.jsonl", "problems": {"limit": 40}}
    asked = {"held_out_tokens": 150, "reserved": 100}
    with pytest.raises(RacError, match=r"held out to measure on.*samples_per_problem") as caught:
        collect(traces, tokens=5000, **asked)
    works = int(re.search(r"set calibration\.tokens=(\d+)", str(caught.value))[1])
    assert works > 200
    before = Path("s.jsonl").read_bytes()
    (pool,) = collect(traces, tokens=works, **asked).values()
    assert pool.usable_tokens() == works
    assert Path("s.jsonl").read_bytes() == before
    with pytest.raises(RacError, match="used up"):
        collect(traces, tokens=works + 1, **asked)
    settings = TraceSettings(sampling=SAMPLING, **traces)

    def need(tokens):
        calibration = CalibrationSettings(tokens=tokens, held_out_tokens=150)
        (line,) = trace_pool.describe_need(tokenizer, settings, calibration, 100)
        return line

    most = int(re.search(r"all 40 problems give at most ([\d,]+)", need(2000))[1].replace(",", ""))
    assert most >= pool.store.counts.tokens
    assert "5,250 tokens of traces are needed" in need(5000)
    assert f"too few: all 40 problems give at most {most:,}" in need(5000)
    assert "give twice as many" in need(100)
