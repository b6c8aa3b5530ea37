"""Answers matched to problems, in this process and in a file that is filled by servers, killed and
resumed."""

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation import accuracy
from rac_modifier.evaluation.accuracy import default_path, evaluate, evaluate_into_file
from rac_modifier.evaluation.results import Row, summarise
from rac_modifier.evaluation.stopping import Loop
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
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


class Scripted:
    """Answers each key with its text, and with EOS unless the text ends in an ellipsis."""

    def __init__(self, script=SCRIPT):
        self.script, self.batches, self.settings = script, [], []

    def __call__(self, model, tokenizer, prompts, settings, keys):
        self.batches.append([len(prompt) for prompt in prompts])
        self.settings.append(settings)
        return [self._answer(tokenizer, self.script[key]) for key in keys]

    @staticmethod
    def _answer(tokenizer, text):
        ids = tuple(tokenizer.encode(text.removesuffix("..."), add_special_tokens=False))
        if text.endswith("..."):
            return Generation(ids, "length")
        return Generation((*ids, tokenizer.eos_token_id), "stop")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def run(tokenizer, problems=PROBLEMS, **changes):
    arguments = {"label": "x", "max_new_tokens": 32, "progress": False, "generate": Scripted()}
    return evaluate(None, tokenizer, problems, **arguments | changes)


@pytest.fixture
def rows(monkeypatch):
    """The rows of the last evaluation."""
    checked: list[Row] = []

    def summarised(given, **options):
        checked[:] = given
        return summarise(given, **options)

    monkeypatch.setattr(accuracy, "summarise", summarised)
    return checked


def test_each_answer_is_matched_to_its_problem_and_counted_in_tokens(tokenizer, rows):
    result = run(tokenizer, batch_size=3)
    assert [(r.id, r.correct, r.ending.kind) for r in rows] == [
        ("short", True, "right"),
        ("longest", False, "wrong"),
        ("longer", False, "going"),
        ("half", True, "right"),
    ]
    assert [r.text for r in rows] == [SCRIPT[p.id].removesuffix("...") for p in PROBLEMS]
    assert (result.correct, result.unfinished_share) == (2, 0.25)
    assert result.per_task == {"a": 0.5, "b": 0.0}
    assert rows[0].ending.thinking_tokens == len("think") + 1
    assert rows[0].ending.tokens == len("think") + 1 + len("\\boxed{1}") + 1  # with EOS
    assert rows[2].ending.thinking_tokens == len("on and on")


def test_the_loop_of_a_truncated_answer_is_located_in_its_tokens(tokenizer, rows):
    script = SCRIPT | {"short": "and on " * 20 + "...", "longer": "and on " * 20}
    run(tokenizer, generate=Scripted(script), max_new_tokens=200)
    assert [r.ending.loop for r in rows] == [Loop(0, len("and on "), "tokens"), None, None, None]
    assert [r.ending.kind for r in rows] == ["looping", "wrong", "wrong", "right"]


def test_prompts_of_like_length_share_a_batch_and_nothing_is_left_to_the_model(tokenizer):
    generate = Scripted()
    run(tokenizer, batch_size=2, temperature=0.6, seed=3, generate=generate)
    lengths = [length for batch in generate.batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in generate.batches] == [2, 2]
    s = generate.settings[0]
    assert (s.temperature, s.top_p, s.top_k, s.max_new_tokens, s.seed) == (0.6, 0.95, 0, 32, 3)


def test_another_verifier_and_another_prompt(tokenizer):
    always = {"a": lambda answer, reference: True}
    assert run(tokenizer, verifiers=always).per_task == {"a": 1.0, "b": 0.0}
    generate = Scripted()
    run(tokenizer, generate=generate, render=lambda tokenizer, question: [5] * 7)
    assert generate.batches == [[7] * 4]


@pytest.mark.parametrize(
    ("problems", "changes", "message"),
    [
        ([], {}, "no problems"),
        ([Problem("q", "1?", None, None)], {}, "1 of 1 problems have no answer .*'q'"),
        ([Problem("q", "1?", " ", None)], {}, "no answer"),
        (PROBLEMS[:1] * 2, {}, "'short' appears twice"),
        (PROBLEMS, {"batch_size": 0}, r"the evaluation: batch_size: .*value 0"),
    ],
)
def test_bad_input(tokenizer, problems, changes, message):
    with pytest.raises(RacError, match=message):
        run(tokenizer, problems, **changes)


def test_nothing_is_generated_where_answers_could_not_be_checked(tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match="needs math-verify; pip install"):
        run(tokenizer, generate=None)
    assert run(tokenizer, PROBLEMS[:2], verifiers={"a": str.__eq__}).correct == 1


def sampling(**changes):
    values = {"temperature": 0.0, "top_p": 0.95, "top_k": 0, "max_new_tokens": 24}
    return SamplingSettings(**values | changes)


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
    return evaluate_into_file(
        ModelIdentity.of_model(model), tokenizer, problems, label="served", source=SOURCE,
        sampling=sampling(**changes), path=path, engine=engine, progress=False,
    )  # fmt: skip


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


def test_a_failed_answer_is_named_and_asked_again(server, tokenizer, model, tmp_path):
    path = tmp_path / "a.jsonl"
    server.fault = lambda _, body: "400" if "7+1?" in tokenizer.decode(body["prompt"]) else None
    with pytest.raises(RacError, match=r"1 of 12 answers are missing \(the first: 'q7#0', .*kept"):
        served(server, tokenizer, model, path)
    server.fault = lambda number, body: None
    asked = len(server.bodies)
    assert served(server, tokenizer, model, path).problems == 12
    assert len(server.bodies) == asked + 1
    assert served(server, tokenizer, model, path, SUMS[:5]).correct == 3  # the file holds more


@torch.no_grad()
def test_in_this_process_it_equals_the_evaluation_without_a_file(tokenizer, model, tmp_path):
    limits = {"max_new_tokens": 24, "batch_size": 5}
    plain = evaluate(model, tokenizer, SUMS, label="x", progress=False, **limits)
    stored = evaluate_into_file(
        model, tokenizer, SUMS, label="x", source=SOURCE, sampling=sampling(),
        path=tmp_path / "a.jsonl", progress=False,
    )  # fmt: skip
    assert stored.endings == plain.endings
    assert stored.correct_answers == plain.correct_answers


@torch.no_grad()
def test_several_answers_differ_and_are_counted_per_problem(tokenizer, model, tmp_path):
    result = evaluate_into_file(
        model, tokenizer, SUMS[:4], label="x", source=SOURCE, path=tmp_path / "a.jsonl",
        sampling=sampling(temperature=1.0, samples_per_problem=3), progress=False,
    )  # fmt: skip
    assert (result.problems, result.samples, set(result.pass_at)) == (4, 3, {"1", "2", "3"})
    traces = list(TraceStore.read(tmp_path / "a.jsonl"))
    assert [trace.id for trace in traces] == [f"q{i}#{j}" for i in range(4) for j in range(3)]
    assert len({trace.completion_ids for trace in traces}) > 8


def test_another_models_answers_are_refused_and_kept(server, tokenizer, model, tmp_path):
    served(server, tokenizer, model, tmp_path / "a.jsonl")
    with pytest.raises(RacError, match=r"under other settings.*fingerprint"):
        served(server, tokenizer, tiny_model(seed=1), tmp_path / "a.jsonl")
    with pytest.raises(RacError, match=r"max_new_tokens: 24 in the store, 25 asked for"):
        served(server, tokenizer, model, tmp_path / "a.jsonl", max_new_tokens=25)
    assert len(TraceStore.read(tmp_path / "a.jsonl")) == 12
    server.bodies.clear()
    with pytest.raises(RacError, match="no answer to check against"):
        served(server, tokenizer, model, tmp_path / "b.jsonl", [Problem("q", "?", None, None)])
    assert not server.bodies


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
