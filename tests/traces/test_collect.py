"""Collecting up to a budget, in this process and from servers, also from servers that fail."""

import dataclasses
import re

import pytest
import torch
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling import engine as engines
from rac_modifier.sampling.generate import generate, render_question
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import NAME, rule
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.0, max_new_tokens=10, batch_size=4)


@pytest.fixture
def run(model, tokenizer, tmp_path):
    def run(name="store.jsonl", *, model=model, tokenizer=tokenizer, again=False, **options):
        options = {"problems": ProblemSource(), "sampling": SAMPLING, "tokens": 500, **options}
        tokens = options.pop("tokens")
        settings = TraceSettings(store=name and str(tmp_path / name), **options)
        return collect_traces(model, tokenizer, settings, tokens, again=again)

    return run


@pytest.fixture
def sampled(monkeypatch):
    """The number of rows of each call of `generate`."""
    calls = []

    def counting(model, tokenizer, prompts, settings, keys):
        calls.append(len(prompts))
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(engines, "generate", counting)
    return calls


def test_the_budget_is_reached_by_the_shortest_run_of_problems(run, model, tokenizer):
    """With any batch size."""
    store = run()
    traces = list(store)
    assert store.counts.tokens >= 500 > store.counts.tokens - traces[-1].tokens
    problems = load_problems(ProblemSource(limit=len(traces)), 0)
    for trace, problem in zip(traces, problems, strict=True):
        prompt = render_question(tokenizer, problem.question)
        (completion,) = generate(model, tokenizer, [prompt], SAMPLING, [trace.id])
        assert (trace.id, trace.problem_id) == (f"{problem.id}#0", problem.id)
        assert (list(trace.prompt_ids), trace.completion_ids) == (prompt, completion.ids)
        assert (trace.question, trace.answer) == (problem.question, problem.answer)
    assert list(run("b.jsonl", sampling=SAMPLING.model_copy(update={"batch_size": 7}))) == traces


def test_prompts_over_the_limit_and_prompts_that_fill_the_context_are_skipped(run, tokenizer):
    problems = load_problems(ProblemSource(limit=40), 0)
    lengths = [len(render_question(tokenizer, problem.question)) for problem in problems]
    longest = max(length for length in lengths if length + 1 in lengths)
    limited = run("a.jsonl", problems=ProblemSource(max_prompt_tokens=longest), tokens=1200)
    small = tiny_model(max_position_embeddings=longest + 1)  # one token is left for an answer
    short = run("b.jsonl", model=small, tokens=1200)
    for store in (limited, short):
        assert max(len(trace.prompt_ids) for trace in store) == longest


def test_enough_already_samples_nothing(run, sampled):
    """Neither for a smaller budget or limit, nor for the same checkpoint in another precision."""
    model = tiny_model().to(torch.bfloat16)
    before = list(run(model=model))
    sampled.clear()
    for changes in ({}, {"tokens": 100}, {"problems": ProblemSource(limit=3)}):
        assert list(run(model=model, **changes)) == before
    assert list(run(model=model.float())) == before
    assert sampled == []


def test_problems_that_end_too_early_say_how_far_they_go(run, sampled):
    words = r"used up: ([\d,]+) tokens in 6 traces, of 5,000 asked for.*ask for tokens=(\d+)"
    with pytest.raises(RacError, match=words) as caught:
        run(problems=ProblemSource(limit=6), tokens=5000)
    held, works = re.search(words, str(caught.value)).groups()
    assert int(held.replace(",", "")) == int(works)
    assert "failed" not in str(caught.value)
    assert sampled == [4, 2]


def test_another_models_store_is_refused_with_the_reason(run, tmp_path):
    run()
    before = (tmp_path / "store.jsonl").read_bytes()
    off_policy = {"model": tiny_model(seed=1), "allow_off_policy": True}
    with pytest.raises(RacError, match=r"collect its own.*traces\.allow_off_policy: true"):
        run(model=off_policy["model"])
    assert run(**off_policy).counts.tokens >= 500
    with pytest.raises(
        RacError, match="5,000 asked for: ask for fewer tokens, or collect more with"
    ):
        run(**off_policy, tokens=5000)
    grown = tiny_tokenizer()
    grown.add_tokens(["<tool>"])
    with pytest.raises(RacError, match="another tokenizer"):
        run(**off_policy, tokenizer=grown, tokens=10)
    assert (tmp_path / "store.jsonl").read_bytes() == before


def test_bad_input_makes_no_store(run, collect, server, tmp_path):
    with pytest.raises(RacError, match="tokens=0"):
        run(tokens=0)
    with pytest.raises(RacError, match="no such file"):
        run(problems=ProblemSource(source="none.jsonl"))
    with pytest.raises(RacError, match="not in memory"):
        collect(engine=False)
    server.cards = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(RacError, match=r"engine\.model"):
        collect()
    assert list(tmp_path.iterdir()) == []


def test_the_default_path_follows_what_decides_the_sampling(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = run(None, tokens=60)

    def path(fingerprint=store.header.fingerprint, limit=None, **sampling):
        settings = SAMPLING.resolved(None).model_copy(update=sampling)
        changes = {"sampling": settings, "problems": ProblemSource(limit=limit)}
        header = store.header.model_copy(update={"fingerprint": fingerprint, **changes})
        return header.path("rac_traces")

    assert store.path == path() == path(limit=4, batch_size=99)
    assert path().exists()
    assert len({path(), path(seed=1), path(fingerprint="0" * 64)}) == 3


def test_the_store_holds_what_the_server_generated(collect, server, is_exact):
    store = collect()
    assert store.counts.tokens >= 3000 > store.counts.tokens - list(store)[-1].tokens
    assert is_exact(store)
    assert 0 < store.counts.finished < len(store)
    assert (store.header.engine.kind, store.header.engine.served_model) == ("openai", NAME)
    server.close()
    assert collect(tokens=2000).sha256() == store.sha256(), "asks nobody"


def greedy(model, tokenizer):
    """What a server that holds this model answers."""

    def answer(body):
        if body["temperature"] > 0:
            return rule(body)
        settings = SamplingSettings(temperature=0, max_new_tokens=body["max_tokens"])
        return list(generate(model, tokenizer, [body["prompt"]], settings, [""])[0].ids)

    return answer


def test_a_store_collected_without_the_weights_is_checked_once_they_are_there(
    collect, server, tokenizer
):
    server.answer = greedy(tiny_model(seed=1), tokenizer)
    collect(verify_model=True, tokens=200)
    words = r"the server that filled trace store .*s\.jsonl.* another model"
    with pytest.raises(RacError, match=words):
        collect(of=tiny_model(), verify_model=True, tokens=200)


def test_two_kinds_of_engines_do_not_fill_one_store(collect, model):
    """Both may read it."""
    collect(tokens=300)
    assert collect(of=model, engine=False, tokens=300).counts.tokens >= 300
    words = r"another engine \(openai, not transformers\).*traces.engine"
    with pytest.raises(RacError, match=words):
        collect(of=model, engine=False, tokens=5000)


def test_token_ids_beyond_the_vocabulary_are_refused_before_they_are_read(run, tmp_path, sampled):
    store = run()
    trace = dataclasses.replace(next(iter(store)), id="x#0", completion_ids=(10**9,))
    with TraceStore.open_append(store.path, store.header) as changed:
        changed.append_many([trace])
    sampled.clear()
    for model in (tiny_model(), tiny_model(seed=1)):
        with pytest.raises(RacError, match="token id 1000000000, beyond the vocabulary of 300"):
            run(model=model, allow_off_policy=True, tokens=100)
    assert sampled == []


def test_what_a_run_says_of_its_store_and_of_the_models_context(run):
    said = []
    sink = logger.add(said.append, format="{message}")
    sampling = SAMPLING.model_copy(update={"max_new_tokens": 99_999})
    model = tiny_model(max_position_embeddings=64)
    try:
        for again in (False, True, False):
            run("long.jsonl", model=model, sampling=sampling, again=again)
    finally:
        logger.remove(sink)
    assert len([text for text in said if "more than the model's context of 64 tokens" in text]) == 2
    assert len([text for text in said if "tokens already" in text]) == 1
