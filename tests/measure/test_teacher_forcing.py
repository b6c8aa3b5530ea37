import torch

from rac_modifier.measure.teacher_forcing import batches_of_like_length, padded, sample_sequences
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer


def test_batches_hold_what_fits_once_padded_and_pad_on_the_right():
    sequences = [([5] * n, 1) for n in (2, 9, 4, 3)]
    batches = list(batches_of_like_length(sequences, 8))
    assert [[len(ids) for ids, _ in batch] for batch in batches] == [[2, 3], [4], [9]]
    ids, completion = padded(batches[0])
    assert ids.tolist() == [[5, 5, 0], [5, 5, 5]]
    assert completion.tolist() == [[False, True, False], [False, True, True]]
    two = [([5] * n, 1) for n in (4, 3)]
    assert [len(batch) for batch in batches_of_like_length(two, 8)] == [2]  # an exact fit
    assert [len(batch) for batch in batches_of_like_length(two, 7)] == [1, 1]


@torch.no_grad()
def test_samples_are_the_models_completions_of_the_rendered_problems():
    model, tokenizer, problems = tiny_model(), tiny_tokenizer(), held_out_problems("arithmetic", 5)
    values = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 12, "batch_size": 2, "seed": 3}
    settings = SamplingSettings(**values, samples_per_problem=2)
    samples = sample_sequences(model, tokenizer, problems, settings)
    prompts = [render_question(tokenizer, p.question) for p in problems for _ in range(2)]
    keys = [f"{p.id}#{i}" for p in problems for i in range(2)]
    expected = generate(model, tokenizer, prompts, settings, keys)
    assert [list(ids[:n]) for ids, n in samples] == prompts
    assert [ids[n:] for ids, n in samples] == [g.ids for g in expected]
    assert len({tuple(ids) for ids, _ in samples}) == 10
