"""Answers of this process and of servers, matched to problems; kills, and files of others."""

import time

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.results import EvalResult, Row
from rac_modifier.evaluation.stopping import Loop
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation, generate, render_question
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import FakeServer
from tests.tiny import byte_tokenizer, tiny_model

PROBLEMS = [
    Problem("short", "1?", "1", "a"),
    Problem("longest", "a long question, 2?", "2", "a"),
    Problem("longer", "a question, 3?", "3", "b"),
    Problem("half", "4?", "1/2", None),
]
SCRIPT = {
    "short": "think</think>\\boxed{1}",
    "longest": "abc</think>\\boxed{3}",
    "longer": "on and on...",
    "half": "h</think>\\boxed{0.5}",
}
SUMS = [Problem(f"q{i}", f"{i}+1?", str(i + 1), "sum") for i in range(12)]
SOURCE = ProblemSource(source="arithmetic")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def sampling(**changes):
    values = {"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 24}
    return SamplingSettings(**values | changes)


def run(model, tokenizer, path, problems=SUMS, verifier=None, engine=None, setup=None, **changes):
    return evaluate(
        model, tokenizer, problems, label="x", source=SOURCE, sampling=sampling(**changes),
        path=path, engine=engine, setup=setup, verifier=verifier,
    )  # fmt: skip


@pytest.fixture
def scripted(model, tokenizer, tmp_path, monkeypatch):
    """Evaluate texts by problem; one that ends in an ellipsis is truncated, others end in EOS."""

    def scripted(script=SCRIPT, problems=PROBLEMS, **changes):
        def generate(model, tokenizer, prompts, settings, keys):
            answers = []
            for text in (script[key.removesuffix("#0")] for key in keys):
                ids = tokenizer.encode(text.removesuffix("..."), add_special_tokens=False)
                end = "length" if text.endswith("...") else "stop"
                eos = [tokenizer.eos_token_id] * (end == "stop")
                answers.append(Generation((*ids, *eos), end))
            return answers

        monkeypatch.setattr("rac_modifier.sampling.engine.generate", generate)
        return run(model, tokenizer, tmp_path / "scripted.jsonl", problems, **changes)

    return scripted


@pytest.fixture
def rows(monkeypatch):
    """The rows of the last evaluation."""
    checked: list[Row] = []
    of = EvalResult.of

    def summarised(given, **options):
        checked[:] = given
        return of(given, **options)

    monkeypatch.setattr(EvalResult, "of", summarised)
    return checked


def test_each_answer_is_matched_to_its_problem_and_counted_in_tokens(scripted, rows):
    result = scripted(batch_size=3)
    assert [(r.id, r.correct, r.ending.kind) for r in rows] == [
        ("short", True, "right"),
        ("longest", False, "wrong"),
        ("longer", False, "going"),
        ("half", True, "right"),
    ]
    assert result.per_task == {"a": 0.5, "b": 0.0}
    assert rows[0].ending.thinking_tokens == len("think") + 1
    assert rows[0].ending.tokens == len("think") + 1 + len("\\boxed{1}") + 1  # with EOS
    assert rows[2].ending.thinking_tokens == len("on and on")


def test_the_loop_of_a_truncated_answer_is_located_in_its_tokens(scripted, rows):
    script = SCRIPT | {"short": "and on " * 20 + "...", "longer": "and on " * 20}
    scripted(script, max_new_tokens=200)
    assert [r.ending.loop for r in rows] == [Loop(0, len("and on "), "tokens"), None, None, None]
    assert [r.ending.kind for r in rows] == ["looping", "wrong", "wrong", "right"]


def test_the_time_of_checking_answers_does_not_count(scripted, monkeypatch):
    """Checking takes an hour here."""
    clock, hour = time.monotonic, 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock() + hour)

    def slowly(answer, reference):
        nonlocal hour
        hour = 3600.0
        return answer == reference

    result = scripted(verifier=slowly)
    assert hour
    assert 0 < result.seconds < 60


def test_reasoning_gym_judges_its_own_tasks(scripted, rows):
    """Countdown wants an expression. Its value alone is equal as mathematics."""
    problems = held_out_problems("reasoning-gym:countdown", 3)
    written, value, other = (problem.answer for problem in problems)
    answers = [f"({written})", f"{eval(value):g}", f"{other} + 0"]
    script = {p.id: f"</think>\\boxed{{{a}}}" for p, a in zip(problems, answers, strict=True)}
    scripted(script, problems, max_new_tokens=200)
    assert [(r.correct, r.ending.kind) for r in rows] == [
        (True, "right"),
        (False, "wrong"),
        (False, "wrong"),
    ]


@pytest.fixture
def server(tokenizer):
    """Answers i + 1 to an even i, and a wrong number to an odd one."""
    fake = FakeServer()

    def answer(body):
        question = tokenizer.decode([i for i in body["prompt"] if i > 3])
        number = int("".join(c for c in question.partition("+")[0] if c.isdigit()))
        text = f"{number}</think>\\boxed{{{99 if number % 2 else number + 1}}}"
        return [*tokenizer.encode(text, add_special_tokens=False), 1]

    fake.answer = answer
    yield fake
    fake.close()


def served(server, tokenizer, model, path, problems=SUMS, **changes):
    engine = EngineSettings(base_urls=(server.url,), concurrency=3, verify_model=False)
    identity = ModelIdentity.of_model(model)
    return run(identity, tokenizer, path, problems, engine=engine, **changes)


def test_a_server_is_asked_each_problem_once_and_after_a_kill_what_is_missing(
    server, tokenizer, model, tmp_path
):
    path = tmp_path / "a.jsonl"
    result = served(server, tokenizer, model, path)
    assert (result.problems, result.correct, result.accuracy) == (12, 6, 0.5)
    assert result.correct_answers == {f"q{i}": int(i % 2 == 0) for i in range(12)}
    assert len(server.bodies) == 12
    assert result.tokens_per_second > 0
    again = served(server, tokenizer, model, path)
    assert len(server.bodies) == 12
    assert again.tokens_per_second == 0.0
    assert again.correct_answers == result.correct_answers
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:6]) + lines[6][:40])  # as a kill leaves it
    server.bodies.clear()
    assert served(server, tokenizer, model, path).correct_answers == result.correct_answers
    assert len(server.bodies) == 12 - 5
    assert path.read_bytes() == b"".join(lines)


def test_the_speed_after_a_kill_is_that_of_the_answers_that_were_missing(
    server, tokenizer, model, tmp_path
):
    """Four answers had finished before an earlier one."""
    path = tmp_path / "a.jsonl"
    served(server, tokenizer, model, path)
    header, *lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, *lines[:5]]))
    TraceStore.pending_path(path).write_bytes(b"".join([header, *lines[8:]]))
    server.bodies.clear()
    result = served(server, tokenizer, model, path)
    assert len(server.bodies) == 3
    tokens = sum(len(trace.completion_ids) for trace in list(TraceStore.read(path))[5:8])
    assert round(result.tokens_per_second * result.seconds) == tokens


def test_answers_from_before_an_eos_was_added_are_refused(model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    run(model, tokenizer, path)
    first = next(iter(TraceStore.read(path)))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, first.completion_ids[0]])
    with pytest.raises(RacError, match=r"before the model's EOS tokens were changed .*'q0#0'"):
        run(model, tokenizer, path)


def test_a_failed_answer_is_named_and_asked_again(server, tokenizer, model, tmp_path):
    path = tmp_path / "a.jsonl"
    server.fault = lambda _, body: "400" if "7+1?" in tokenizer.decode(body["prompt"]) else None
    with pytest.raises(RacError, match=r"1 of 12 answers are missing \(first: 'q7#0', .*kept"):
        served(server, tokenizer, model, path)
    server.fault = lambda number, body: None
    asked = len(server.bodies)
    assert served(server, tokenizer, model, path).problems == 12
    assert len(server.bodies) == asked + 1
    assert served(server, tokenizer, model, path, SUMS[:5]).correct == 3  # the file holds more


def test_a_prompt_that_fills_the_context_is_refused_before_any_is_asked(
    server, tokenizer, model, tmp_path
):
    problems = [*SUMS, Problem("long", "1" * model.config.max_position_embeddings, "1", "sum")]
    with pytest.raises(RacError, match=r"problem 'long' has \d+ tokens and fills .* \d+; leave"):
        served(server, tokenizer, model, tmp_path / "a.jsonl", problems)
    assert not server.bodies
    assert not list(tmp_path.iterdir())


def test_several_answers_differ_and_are_counted_per_problem(tokenizer, model, tmp_path):
    """A model in this process: its completions, with the seed of each answer's id."""
    path = tmp_path / "a.jsonl"
    result = run(model, tokenizer, path, SUMS[:4], temperature=1.0, samples_per_problem=3)
    assert (result.problems, result.samples, set(result.pass_at)) == (4, 3, {"1", "2", "3"})
    keys = [f"q{i}#{j}" for i in range(4) for j in range(3)]
    prompts = [render_question(tokenizer, p.question) for p in SUMS[:4] for _ in range(3)]
    expected = generate(model, tokenizer, prompts, sampling(temperature=1.0), keys)
    traces = list(TraceStore.read(path))
    assert [trace.id for trace in traces] == keys
    assert [trace.completion_ids for trace in traces] == [answer.ids for answer in expected]
    assert len({trace.completion_ids for trace in traces}) > 8


def test_another_models_answers_are_refused_and_kept(server, tokenizer, model, tmp_path):
    served(server, tokenizer, model, tmp_path / "a.jsonl")
    with pytest.raises(RacError, match=r"under other settings.*fingerprint"):
        served(server, tokenizer, tiny_model(seed=1), tmp_path / "a.jsonl")
    with pytest.raises(RacError, match=r"max_new_tokens: 24 in the file, 25 asked for"):
        served(server, tokenizer, model, tmp_path / "a.jsonl", max_new_tokens=25)
    with pytest.raises(RacError, match=r"answers of openai, not of transformers"):
        run(model, tokenizer, tmp_path / "a.jsonl")
    assert len(TraceStore.read(tmp_path / "a.jsonl")) == 12


def test_answers_of_a_model_that_ran_otherwise_are_refused(server, tokenizer, model, tmp_path):
    refused = pytest.raises(RacError, match=r"a\.jsonl holds answers of this model run otherwise")
    path = tmp_path / "a.jsonl"
    served(server, tokenizer, model, path, setup="int8")
    with refused:
        served(server, tokenizer, model, path, setup="int4")
    assert served(server, tokenizer, model, path, setup="int8").problems == 12
    path.unlink()
    run(model, tokenizer, path)
    with refused:
        run(tiny_model().to(torch.bfloat16), tokenizer, path)
