import json

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling import in_process
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.prompts import render_prompt
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.collect import collect_traces, default_store_path
from rac_modifier.traces.failures import read_failures
from rac_modifier.traces.store import TraceStore
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=10, batch_size=4)
ARITHMETIC = ProblemSource()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def run(model, tokenizer, tmp_path):
    def run(
        name="store.jsonl",
        *,
        model=model,
        tokens=500,
        problems=ARITHMETIC,
        sampling=SAMPLING,
        **options,
    ):
        return collect_traces(
            model,
            tokenizer,
            tmp_path / name,
            problems=problems,
            sampling=sampling,
            tokens=tokens,
            progress=False,
            **options,
        )

    return run


@pytest.fixture
def sampled(monkeypatch):
    """The number of rows of each call of `generate`."""
    calls = []

    def counting(model, tokenizer, prompts, settings, keys):
        calls.append(len(prompts))
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(in_process, "generate", counting)
    return calls


def test_the_budget_is_reached_by_the_shortest_run_of_problems(run, model, tokenizer):
    store = run()
    traces = list(store)
    assert store.counts.tokens >= 500 > store.counts.tokens - traces[-1].tokens
    problems = list(load_problems(ProblemSource(limit=len(traces)), 0))
    assert [t.problem_id for t in traces] == [p.id for p in problems]
    for one, problem in zip(traces, problems, strict=True):
        assert one.id == f"{problem.id}#0"
        assert list(one.prompt_ids) == render_prompt(tokenizer, problem.question)
        expected = generate(model, tokenizer, [list(one.prompt_ids)], SAMPLING, [one.id])[0]
        assert one.completion_ids == expected.ids
        assert (one.question, one.answer) == (problem.question, problem.answer)


def test_the_batch_size_does_not_change_the_traces(run):
    one = list(run("a.jsonl"))
    other = list(run("b.jsonl", sampling=SAMPLING.model_copy(update={"batch_size": 7})))
    assert one == other


def test_enough_already_samples_nothing(run, sampled):
    before = run()
    sampled.clear()
    assert list(run()) == list(before)
    assert list(run(tokens=100, sampling=SAMPLING.model_copy(update={"batch_size": 9}))) == list(
        before
    )
    assert sampled == []


@pytest.mark.parametrize("lost", [1, 3, 6])
def test_lost_lines_are_sampled_again_and_come_out_the_same(run, tmp_path, sampled, lost):
    run(tokens=700)
    whole = (tmp_path / "store.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "store.jsonl").write_bytes(b"".join(lines[:-lost]) + lines[-lost][:40])
    sampled.clear()
    run(tokens=700)
    assert (tmp_path / "store.jsonl").read_bytes() == whole
    assert len(sampled) <= 1 + (lost + 3) // 4


def test_problems_that_end_too_early_say_how_far_they_go(run, sampled):
    few = ProblemSource(limit=6)
    with pytest.raises(
        RacError, match=r"used up: (\d+) tokens in 6 traces, of 5,000 asked for.*ask for tokens=\1"
    ) as caught:
        run(problems=few, tokens=5000)
    assert "problems failed" not in str(caught.value)
    store = run(problems=ProblemSource(limit=9), tokens=300)
    assert len(store) == 9 or store.counts.tokens >= 300
    assert sampled[:2] == [4, 2]


def test_a_smaller_limit_is_content_with_a_store_that_holds_enough(run, sampled):
    before = run(tokens=600)
    sampled.clear()
    assert list(run(tokens=600, problems=ProblemSource(limit=3))) == list(before)
    assert sampled == []


def test_another_models_store_is_refused_with_the_reason(run, tmp_path):
    run()
    before = (tmp_path / "store.jsonl").read_bytes()
    other = tiny_model(seed=1)
    with pytest.raises(
        RacError, match=r"another model.*own traces.*\.900.*\.876.*allow_off_policy=True"
    ):
        run(model=other)
    store = run(model=other, allow_off_policy=True)
    assert store.counts.tokens >= 500
    with pytest.raises(RacError, match="never appended to"):
        run(model=other, allow_off_policy=True, tokens=5000)
    assert (tmp_path / "store.jsonl").read_bytes() == before


def test_off_policy_needs_the_same_tokenizer(run, tmp_path):
    run()
    grown = tiny_tokenizer()
    grown.add_tokens(["<tool>"])
    with pytest.raises(RacError, match="another tokenizer"):
        collect_traces(
            tiny_model(seed=1),
            grown,
            tmp_path / "store.jsonl",
            problems=ProblemSource(),
            sampling=SAMPLING,
            tokens=10,
            allow_off_policy=True,
            progress=False,
        )


def test_the_same_checkpoint_in_another_precision_shares_the_store(run, sampled):
    model = tiny_model().to(torch.bfloat16)
    before = run(model=model)
    sampled.clear()
    assert list(run(model=model.float())) == list(before)
    assert sampled == []


def test_bad_input_makes_no_store(run, tmp_path):
    with pytest.raises(RacError, match="tokens=0"):
        run(tokens=0)
    with pytest.raises(RacError, match="no such file"):
        run(problems=ProblemSource(source="none.jsonl"))
    assert not (tmp_path / "store.jsonl").exists()


def test_the_default_path_follows_what_decides_the_sampling(
    model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    store = collect_traces(
        model,
        tokenizer,
        None,
        problems=ProblemSource(),
        sampling=SAMPLING,
        tokens=60,
        progress=False,
    )
    path = default_store_path(store.header.fingerprint, SAMPLING.resolved(None), ProblemSource())
    assert store.path == path
    assert TraceStore.read(path).counts == store.counts
    assert path.parent.name == "rac_traces"
    free = default_store_path(
        store.header.fingerprint,
        SAMPLING.resolved(None).model_copy(update={"batch_size": 99}),
        ProblemSource(limit=4),
    )
    assert free == path
    reseeded = SAMPLING.resolved(None).model_copy(update={"seed": 1})
    assert default_store_path(store.header.fingerprint, reseeded, ProblemSource()) != path
    assert default_store_path("0" * 64, SAMPLING.resolved(None), ProblemSource()) != path


def test_long_prompts_are_passed_over_whole_and_noted(run, tokenizer, tmp_path):
    """Neither cut nor a reason to stop: the others are collected, in the same order."""
    rows = [{"problem": f"{i}" + " + 1" * (60 if i % 3 == 0 else 1)} for i in range(30)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ProblemSource(source=str(tmp_path / "p.jsonl"), max_prompt_tokens=100)
    store = run(problems=source, tokens=200)
    prompts = {tuple(render_prompt(tokenizer, row["problem"])) for row in rows}
    assert all(t.prompt_ids in prompts and len(t.prompt_ids) <= 100 for t in store)
    noted = read_failures(store.path)
    assert noted
    assert all("is longer than problems.max_prompt_tokens=100" in one.reason for one in noted)
    assert run(problems=source, tokens=250).counts.tokens >= 250
    again = read_failures(store.path)
    assert len({one.id for one in again}) == len(again)


def test_a_prompt_that_fills_the_context_does_not_end_the_run(run, tmp_path):
    rows = [{"problem": "1" * (600 if i == 4 else 5) + str(i)} for i in range(30)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = run(problems=ProblemSource(source=str(tmp_path / "p.jsonl")), tokens=400)
    assert [one.reason for one in read_failures(store.path)] == [
        "a prompt of 604 tokens fills the model's context of 512"
    ]
