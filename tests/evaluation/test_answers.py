"""Answers kept in a file: of servers and of this process, killed and resumed, several per problem."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.answers import default_path, evaluate_into_file
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import FakeServer
from tests.tiny import byte_tokenizer, tiny_model

PROBLEMS = [Problem(f"q{i}", f"{i}+1?", str(i + 1), "sum") for i in range(12)]
SOURCE = ProblemSource(source="arithmetic")


def sampling(**changes):
    return SamplingSettings(
        **{"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 24, **changes}
    )


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def server(tokenizer):
    """It answers i + 1 to an even i, and a wrong number to an odd one."""
    fake = FakeServer()

    def answer(body):
        question = tokenizer.decode([i for i in body["prompt"] if i > 3])
        number = int("".join(c for c in question.partition("+")[0] if c.isdigit()))
        right = number + 1 if number % 2 == 0 else 99
        text = f"{number}</think>\\boxed{{{right}}}"
        return [*tokenizer.encode(text, add_special_tokens=False), 1]

    fake.answer = answer
    fake.text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    yield fake
    fake.close()


def served(server, tokenizer, model, path, problems=PROBLEMS, *, verify=False, **changes):
    engine = EngineSettings(base_urls=(server.url,), concurrency=3, tries=2, verify_model=verify)
    return evaluate_into_file(
        ModelIdentity.of_model(model), tokenizer, problems, label="served", source=SOURCE,
        sampling=sampling(**changes), path=path, engine=engine, progress=False,
    )  # fmt: skip


def test_a_server_is_asked_each_problem_once_and_its_answers_are_checked(
    server, tokenizer, model, tmp_path
):
    found = served(server, tokenizer, model, tmp_path / "a.jsonl")
    assert (found.problems, found.correct, found.accuracy) == (12, 6, 0.5)
    assert found.correct_answers == {f"q{i}": int(i % 2 == 0) for i in range(12)}
    assert len(server.bodies) == 12
    assert found.tokens_per_second > 0
    again = served(server, tokenizer, model, tmp_path / "a.jsonl")
    assert len(server.bodies) == 12
    assert again.tokens_per_second == 0.0
    assert again.correct_answers == found.correct_answers


def test_a_server_without_token_ids_is_judged_by_its_text(server, tokenizer, model, tmp_path):
    """As llama.cpp answers: the same accuracy and lengths, and nothing that could be calibrated on."""
    exact = served(server, tokenizer, model, tmp_path / "a.jsonl", PROBLEMS[:6], verify=True)
    server.fault = lambda number, body: "no_ids"
    found = served(server, tokenizer, model, tmp_path / "b.jsonl", PROBLEMS[:6], verify=True)
    timed = {"seconds": 0.0, "tokens_per_second": 0.0}
    assert {**found.as_dict(), **timed} == {**exact.as_dict(), **timed}
    kinds = [TraceStore.read(tmp_path / f"{name}.jsonl").header.engine.kind for name in "ab"]
    assert kinds == ["openai", "openai text"]
    assert served(server, tokenizer, model, tmp_path / "b.jsonl", verify=True).problems == 12, (
        "it is gone on with"
    )
    with pytest.raises(
        RacError,
        match=r"holds too few tokens, and was filled by another engine \(openai, not openai text",
    ):
        served(server, tokenizer, model, tmp_path / "a.jsonl", verify=True)
    with pytest.raises(
        RacError, match=r"b\.jsonl' holds answers of a server that returns no token ids"
    ):
        collect_traces(
            model,
            tokenizer,
            tmp_path / "b.jsonl",
            problems=SOURCE,
            sampling=sampling(),
            tokens=10,
            progress=False,
        )


def test_what_is_missing_is_asked_again(server, tokenizer, model, tmp_path):
    path = tmp_path / "a.jsonl"
    server.fault = lambda number, body: (
        "400" if "7+1?" in tokenizer.decode(body["prompt"]) else None
    )
    with pytest.raises(
        RacError, match=r"1 of 12 answers are missing \(the first: 'q7#0', .*kept in .*run again"
    ):
        served(server, tokenizer, model, path)
    server.fault = lambda number, body: None
    asked = len(server.bodies)
    assert served(server, tokenizer, model, path).problems == 12
    assert len(server.bodies) == asked + 1
    assert (
        served(server, tokenizer, model, path, PROBLEMS[:5]).correct == 3
    )  # fewer problems than the file holds


def test_an_answer_of_a_stopped_run_is_not_asked_again(server, tokenizer, model, tmp_path):
    """As a kill leaves the file: whole lines, then half of one."""
    path = tmp_path / "a.jsonl"
    whole = served(server, tokenizer, model, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:40])
    server.bodies.clear()
    assert served(server, tokenizer, model, path).correct_answers == whole.correct_answers
    assert len(server.bodies) == 12 - 5
    assert path.read_bytes() == b"".join(lines)


def test_in_this_process_it_equals_the_evaluation_without_a_file(tokenizer, model, tmp_path):
    plain = evaluate(
        model, tokenizer, PROBLEMS, label="x", max_new_tokens=24, batch_size=5, progress=False
    )
    kept = evaluate_into_file(
        model, tokenizer, PROBLEMS, label="x", source=SOURCE, sampling=sampling(), path=tmp_path / "a.jsonl", progress=False
    )  # fmt: skip
    for name in (
        "correct_answers",
        "mean_completion_tokens",
        "unfinished_share",
        "mean_thinking_tokens",
    ):
        assert getattr(kept, name) == getattr(plain, name)


def test_several_answers_differ_and_are_counted_per_problem(tokenizer, model, tmp_path):
    several = sampling(temperature=1.0, samples_per_problem=3)
    found = evaluate_into_file(
        model, tokenizer, PROBLEMS[:4], label="x", source=SOURCE, sampling=several, path=tmp_path / "a.jsonl", progress=False
    )  # fmt: skip
    assert (found.problems, found.samples, set(found.pass_at)) == (4, 3, {"1", "2", "3"})
    traces = list(TraceStore.read(tmp_path / "a.jsonl"))
    assert [trace.id for trace in traces] == [f"q{i}#{j}" for i in range(4) for j in range(3)]
    assert len({trace.completion_ids for trace in traces}) > 8


def test_another_models_answers_are_refused(server, tokenizer, model, tmp_path):
    served(server, tokenizer, model, tmp_path / "a.jsonl")
    with pytest.raises(RacError, match=r"under other settings.*fingerprint"):
        served(server, tokenizer, tiny_model(seed=1), tmp_path / "a.jsonl")
    with pytest.raises(
        RacError, match=r"under other settings.*max_new_tokens: 24 in the store, 25 asked for"
    ):
        served(server, tokenizer, model, tmp_path / "a.jsonl", max_new_tokens=25)


def test_a_server_that_is_gone_loses_nothing(server, tokenizer, model, tmp_path):
    served(server, tokenizer, model, tmp_path / "a.jsonl", PROBLEMS[:4])
    server.close()
    with pytest.raises(RacError):
        served(server, tokenizer, model, tmp_path / "a.jsonl")
    assert len(TraceStore.read(tmp_path / "a.jsonl")) == 4


def test_the_default_file_is_named_after_the_model_and_the_settings(model):
    identity = ModelIdentity.of_model(model)
    names = {
        default_path(identity, sampling(), SOURCE),
        default_path(identity, sampling(seed=1), SOURCE),
        default_path(identity, sampling(), ProblemSource(source="other.jsonl")),
        default_path(ModelIdentity.of_model(tiny_model(seed=1)), sampling(), SOURCE),
    }
    assert len(names) == 4
    assert {path.parent.name for path in names} == {"rac_answers"}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_problems_that_cannot_be_graded_are_refused_before_anything_is_asked(
    server, tokenizer, model, tmp_path
):
    with pytest.raises(RacError, match="no answer to check against"):
        served(server, tokenizer, model, tmp_path / "a.jsonl", [Problem("q", "?", None, None)])
    assert not server.bodies
