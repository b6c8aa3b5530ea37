"""One model measured beside its dense model, compared with plain loops."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.frontier.measure import HeldOut, layers_of, measure, measure_dense
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=0.0, top_k=0, max_new_tokens=12, batch_size=4)
PROBLEMS = [Problem(str(i), "what is this?"[: i + 3], "7", None) for i in range(5)]


@pytest.fixture(scope="module")
def models():
    dense, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.0 + 0.05 * torch.randn_like(parameter))
    return dense, other


@torch.no_grad()
def kl_along(dense, other, prompt, ids):
    both = torch.tensor([[*prompt, *ids]])
    p, q = (
        model(both).logits[0, len(prompt) - 1 : -1].double().softmax(-1) for model in (dense, other)
    )
    return (p * (p / q).log()).sum(-1).tolist()


def test_divergence_is_measured_on_the_dense_answers_in_the_order_of_the_problems(models):
    dense, other = models
    tokenizer, held_out = tiny_tokenizer(), HeldOut(PROBLEMS, SAMPLING)
    reference = measure_dense(dense, tokenizer, held_out)
    found = measure("other", other, dense, tokenizer, held_out, reference)
    values = []
    for problem, of_dense, own in zip(PROBLEMS, reference.traces, found.traces, strict=True):
        assert own["id"] == of_dense["id"] == problem.id
        kl = kl_along(
            dense, other, render_question(tokenizer, problem.question, SAMPLING), of_dense["ids"]
        )
        assert own["kl"] == pytest.approx(kl, abs=1e-4)
        values += kl
    assert found.figures["divergence"]["kl"] == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert found.figures["divergence"]["tokens"] == len(values)
    assert found.figures["outside_repetitions"] is None, "no answer repeats itself"
    assert sum(values) > 0.01, "the models differ, so that this says something"


def test_answers_are_graded_and_paired_where_there_are_answers(models):
    dense, other = models
    held_out = HeldOut(PROBLEMS, SAMPLING)
    reference = measure_dense(dense, tiny_tokenizer(), held_out)
    found = measure("other", other, dense, tiny_tokenizer(), held_out, reference)
    assert reference.figures["divergence"] is reference.figures["paired"] is None
    assert found.figures["accuracy"]["label"] == "other"
    assert found.figures["accuracy"]["problems"] == found.figures["paired"]["problems"] == 5
    lengths = [trace["thinking"] for trace in found.traces]
    assert found.figures["length"]["thinking"] == lengths
    assert found.figures["length"]["mean"] == pytest.approx(sum(lengths) / 5)
    cut = [trace["finish"] == "length" for trace in found.traces]
    assert found.figures["length"]["cut_share"] == pytest.approx(sum(cut) / 5)
    assert found.figures["length"]["repeating_share"] == 0.0


def test_answers_that_were_cut_while_they_repeated_themselves(models, monkeypatch):
    dense, _ = models
    ends = [
        ((5, 6) * 40, "length"),
        ((5, 6) * 40, "stop"),
        (tuple(range(80)), "length"),
        ((7,), "stop"),
        ((7,) * 64, "length"),
    ]
    answers = [Generation(ids, reason) for ids, reason in ends]
    monkeypatch.setattr("rac_modifier.frontier.measure.ask", lambda *_: answers)
    found = measure_dense(dense, tiny_tokenizer(), HeldOut(PROBLEMS, SAMPLING)).figures["length"]
    assert (found["cut_share"], found["repeating_share"]) == pytest.approx((3 / 5, 2 / 5))


def test_kl_outside_of_repetitions_leaves_tails_of_cut_answers_out(models, monkeypatch):
    dense, other = models
    tokenizer, held_out = tiny_tokenizer(), HeldOut(PROBLEMS[:3], SAMPLING)
    ends = [((5, 6) * 40, "length"), ((5, 6) * 40, "stop"), ((9, 8, 7), "stop")]
    answers = [Generation(ids, reason) for ids, reason in ends]
    monkeypatch.setattr("rac_modifier.frontier.measure.ask", lambda *_: answers)
    monkeypatch.setattr("rac_modifier.evaluation.intervals.LEAST_ROWS", 2)
    reference = measure_dense(dense, tokenizer, held_out)
    found = measure("other", other, dense, tokenizer, held_out, reference).figures[
        "outside_repetitions"
    ]
    rows = [
        kl_along(dense, other, render_question(tokenizer, problem.question, SAMPLING), answer.ids)
        for problem, answer in zip(held_out.problems, answers, strict=True)
    ]
    rows[0] = rows[0][:2]  # the first copy
    values = [value for row in rows for value in row]
    mean = sum(values) / len(values)
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in rows)
    assert found["tokens"] == len(values) == 85
    assert found["kl"] == pytest.approx(mean, rel=1e-3)
    assert found["kl_stderr"] == pytest.approx((1.5 * squares) ** 0.5 / 85, rel=1e-3)
    assert reference.figures["outside_repetitions"] is None


def test_without_answers_nothing_is_graded(models):
    dense, other = models
    held_out = HeldOut([*PROBLEMS[:2], Problem("open", "why?", None, None)], SAMPLING)
    reference = measure_dense(dense, tiny_tokenizer(), held_out)
    found = measure("other", other, dense, tiny_tokenizer(), held_out, reference)
    assert found.figures["accuracy"] is found.figures["paired"] is None
    assert [trace["correct"] for trace in found.traces] == [None] * 3
    assert found.figures["divergence"]["sequences"] == 3


def test_layers_of_a_run_record():
    modules = [
        {"name": "a", "relative_error": 0.5, "sparsity": 0.25, "tokens": 3},
        {"name": "b", "relative_error": float("nan")},
        {"no": "name"},
        3,
    ]
    assert layers_of({"modules": modules}) == {
        "a": {"error": 0.5, "sparsity": 0.25},
        "b": {"error": None, "sparsity": None},
    }
    assert layers_of({}) == layers_of({"modules": 3}) == {}
