import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation import accuracy
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.results import Row, summarise
from rac_modifier.evaluation.stopping import Loop
from rac_modifier.problems.source import Problem
from tests.evaluation.scripted import Scripted
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


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def run(tokenizer, problems=PROBLEMS, **changes):
    arguments = {
        "label": "x",
        "max_new_tokens": 32,
        "progress": False,
        "generate": Scripted(SCRIPT),
    } | changes
    return evaluate(None, tokenizer, problems, **arguments)


@pytest.fixture
def rows(monkeypatch):
    """The rows of the last evaluation."""
    checked: list[Row] = []

    def summarised(given, **options):
        checked[:] = given
        return summarise(given, **options)

    monkeypatch.setattr(accuracy, "summarise", summarised)
    return checked


def test_each_answer_is_matched_to_its_problem(tokenizer, rows):
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


def test_lengths_count_tokens_with_eos_and_closing_tag(tokenizer):
    result = run(tokenizer, PROBLEMS[:1])
    assert result.mean_thinking_tokens == len("think") + 1
    assert result.mean_completion_tokens == len("think") + 1 + len("\\boxed{1}") + 1
    assert run(tokenizer, PROBLEMS[2:3]).mean_thinking_tokens == len("on and on")


def test_the_loop_of_a_truncated_answer_is_located_in_its_tokens(tokenizer, rows):
    script = SCRIPT | {
        "short": "and on " * 20 + "...",
        "longer": "and on " * 20,
        "half": "a" * 70 + "b...",
    }
    result = run(tokenizer, generate=Scripted(script), max_new_tokens=200)
    loop = Loop(0, len("and on "), "tokens")
    assert [(r.ending.kind, r.ending.loop) for r in rows] == [
        ("looping", loop),
        ("wrong", None),
        ("wrong", None),
        ("going", None),
    ]
    assert result.unfinished_share == 0.5


def test_prompts_of_like_length_share_a_batch_longest_first(tokenizer):
    generate = Scripted(SCRIPT)
    run(tokenizer, batch_size=2, generate=generate)
    lengths = [length for batch in generate.batches for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in generate.batches] == [2, 2]


def test_nothing_about_sampling_is_left_to_the_model(tokenizer):
    generate = Scripted(SCRIPT)
    run(tokenizer, temperature=0.6, seed=3, generate=generate)
    used = generate.settings[0]
    assert (used.temperature, used.top_p, used.top_k, used.max_new_tokens, used.seed) == (
        0.6,
        0.95,
        0,
        32,
        3,
    )


def test_a_task_may_bring_its_verifier(tokenizer):
    always = {"a": lambda answer, reference: True}
    assert run(tokenizer, verifiers=always).per_task == {"a": 1.0, "b": 0.0}


def test_another_prompt(tokenizer):
    generate = Scripted(SCRIPT)
    run(tokenizer, generate=generate, render=lambda tokenizer, question: [5] * 7)
    assert generate.batches == [[7] * 4]


@pytest.mark.parametrize(
    ("problems", "changes", "message"),
    [
        ([], {}, "no problems"),
        (
            [Problem("q", "1?", None, None)],
            {},
            "1 of 1 problems have no answer .*'q'.*answer_column",
        ),
        ([Problem("q", "1?", " ", None)], {}, "no answer"),
        (PROBLEMS[:1] * 2, {}, "'short' appears twice"),
        (PROBLEMS, {"batch_size": 0}, r"the evaluation: batch_size: .*value 0"),
        (PROBLEMS, {"max_new_tokens": 0}, r"max_new_tokens: .*value 0"),
        (PROBLEMS, {"temperature": -1.0}, r"temperature: .*value -1\.0"),
    ],
)
def test_bad_input(tokenizer, problems, changes, message):
    with pytest.raises(RacError, match=message):
        run(tokenizer, problems, **changes)


def test_nothing_is_generated_where_answers_could_not_be_checked(tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match="needs math-verify; pip install"):
        run(tokenizer, generate=None)
    own = {"a": str.__eq__}
    assert run(tokenizer, PROBLEMS[:2], verifiers=own).correct == 1


def test_real_generation_is_measured_and_repeatable(tokenizer):
    model = tiny_model()
    arguments = {"label": "x", "max_new_tokens": 12, "progress": False, "temperature": 1.0}
    first = evaluate(model, tokenizer, PROBLEMS, batch_size=3, **arguments)
    again = evaluate(model, tokenizer, PROBLEMS, batch_size=1, **arguments)
    assert first.correct == 0
    assert 0 < first.mean_completion_tokens <= 12
    assert first.mean_completion_tokens == again.mean_completion_tokens
    assert (first.cap, first.temperature, first.problems) == (12, 1.0, 4)
