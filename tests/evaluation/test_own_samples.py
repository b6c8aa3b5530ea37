import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.prompts import render_prompt
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=12, batch_size=2, seed=3)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def problems():
    return held_out_problems("arithmetic", 5)


def test_samples_are_the_models_completions_of_the_rendered_problems(model, problems):
    tokenizer = tiny_tokenizer()
    found = sample_sequences(model, tokenizer, problems, SAMPLING, progress=False)
    prompts = [render_prompt(tokenizer, p.question) for p in problems]
    expected = generate(model, tokenizer, prompts, SAMPLING, [f"{p.id}#0" for p in problems])
    assert [list(ids[:n]) for ids, n in found] == prompts
    assert [ids[n:] for ids, n in found] == [g.ids for g in expected]
    assert divergence(model, model, found, label="x", progress=False).kl == 0


def test_several_samples_of_a_problem_differ(model, problems):
    twice = SAMPLING.model_copy(update={"samples_per_problem": 2})
    found = sample_sequences(model, tiny_tokenizer(), problems[:2], twice, progress=False)
    assert len(found) == len({tuple(ids) for ids, _ in found}) == 4


def test_no_problems(model):
    with pytest.raises(RacError, match="no problems to sample on"):
        sample_sequences(model, tiny_tokenizer(), [], SAMPLING)
