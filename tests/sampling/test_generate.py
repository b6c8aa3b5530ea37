import pytest
import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from rac_modifier.errors import RacError
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.sampling.generate import (
    eos_token_ids,
    generate,
    render_question,
    sample_sequences,
)
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer

HOT = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=24)
GREEDY = SamplingSettings(temperature=0, max_new_tokens=24)
PROMPTS = [[2, 40, 50], [2, 60], [2, 10, 11, 12, 13, 14, 15, 16], [2, 33, 34, 35, 36]]
KEYS = [f"p{i}#0" for i in range(len(PROMPTS))]


def test_every_eos_ends_a_completion_and_is_kept_without_pads():
    """Also if the id of the padding is an EOS."""
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    ends = [1, *range(100, 128)]
    model.generation_config = GenerationConfig(eos_token_id=ends)
    prompts, keys = [[2, 40 + i % 7] for i in range(32)], [f"k{i}" for i in range(32)]
    answers = generate(model, tokenizer, prompts, HOT, keys)
    assert len({len(g.ids) for g in answers}) > 3
    assert len({g.ids[-1] for g in answers}) > 5
    for g in answers:
        assert sum(i in ends for i in g.ids) == (g.finish_reason == "stop") == (g.ids[-1] in ends)


def test_a_padding_token_may_be_beyond_the_embedding():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer))
    expected = generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert generate(model, tokenizer, PROMPTS, GREEDY, KEYS) == expected


def test_the_context_caps_each_row_by_its_own_prompt(tokenizer):
    model = tiny_model(vocab_size=128, max_position_embeddings=16)
    model.generation_config.eos_token_id = 127
    model.lm_head.weight.data[127] = 0
    answers = generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
    assert [len(g.ids) for g in answers] == [13, 14, 8, 11]
    assert {g.finish_reason for g in answers} == {"length"}
    assert generate(model, tokenizer, PROMPTS[:1], GREEDY, KEYS[:1])[0] == answers[0]
    with pytest.raises(RacError, match="16 tokens fills the model's context of 16"):
        generate(model, tokenizer, [[2] * 16], GREEDY, ["k"])


def test_the_seed_decides_the_draw_and_top_k_and_top_p_narrow_it(model, tokenizer):
    def drawn(**changes):
        return generate(model, tokenizer, PROMPTS, HOT.model_copy(update=changes), KEYS)

    greedy = generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
    assert len({str(answers) for answers in (greedy, drawn(), drawn(seed=1))}) == 3
    assert drawn(top_k=1) == drawn(top_p=1e-6) == greedy


def test_what_cannot_be_sampled_is_refused(model, tokenizer):
    assert generate(model, tokenizer, [], GREEDY, []) == []
    with pytest.raises(RacError, match="no tokens"):
        generate(model, tokenizer, [[]], GREEDY, ["k"])
    with pytest.raises(RacError, match="token id 128, beyond the model's vocabulary of 128"):
        generate(model, tokenizer, [[2, 128]], GREEDY, ["k"])
    endless, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    endless.generation_config.eos_token_id = None
    assert eos_token_ids(endless, tokenizer) == [1]
    endless.generation_config.eos_token_id = [7, 9]
    assert eos_token_ids(endless, tokenizer) == [7, 9, 1]  # the tokenizer's ends an answer too
    endless.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(RacError, match="EOS"):
        generate(endless, tokenizer, PROMPTS, GREEDY, KEYS)


def test_a_model_whose_state_would_be_lost_between_tokens_is_refused(tokenizer):
    """Mamba takes `past_key_values`, and does not read it."""
    sizes = {"vocab_size": 128, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    model = MambaForCausalLM(MambaConfig(**sizes))
    with pytest.raises(RacError, match="MambaForCausalLM keeps its state in cache_params"):
        generate(model, tokenizer, PROMPTS, GREEDY, KEYS)


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
