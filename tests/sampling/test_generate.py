import pytest
import torch
from loguru import logger
from transformers import GenerationConfig

from rac_modifier.errors import RacError
from rac_modifier.sampling import generate as generation
from rac_modifier.sampling.generate import generate
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer

HOT = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=24)
GREEDY = SamplingSettings(temperature=0, max_new_tokens=24)
PROMPTS = [[2, 40, 50], [2, 60], [2, 10, 11, 12, 13, 14, 15, 16], [2, 33, 34, 35, 36]]
KEYS = [f"p{i}#0" for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def warnings():
    generation.warn_of_cap.cache_clear()
    generation._warn_of_penalty.cache_clear()
    lines = []
    sink = logger.add(lines.append, format="{message}")
    yield lines
    logger.remove(sink)


@pytest.mark.parametrize("how", [HOT, GREEDY])
def test_a_completion_does_not_depend_on_its_batch(model, tokenizer, how):
    alone = [
        generate(model, tokenizer, [p], how, [k])[0] for p, k in zip(PROMPTS, KEYS, strict=True)
    ]
    assert generate(model, tokenizer, PROMPTS, how, KEYS) == alone
    assert generate(model, tokenizer, PROMPTS[::-1], how, KEYS[::-1]) == alone[::-1]


def test_seed_and_key_both_matter(model, tokenizer):
    same = [PROMPTS[0]] * 2
    first, second = generate(model, tokenizer, same, HOT, ["a#0", "a#1"])
    assert first != second
    assert generate(model, tokenizer, same, HOT, ["a#0", "a#0"])[1] == first
    reseeded = HOT.model_copy(update={"seed": 1})
    assert generate(model, tokenizer, same, reseeded, ["a#0", "a#1"])[0] != first


def test_first_tokens_follow_the_models_distribution(model, tokenizer):
    how = SamplingSettings(temperature=0.5, top_p=0.7, top_k=5, max_new_tokens=1)
    rows = 4000
    drawn = generate(model, tokenizer, [PROMPTS[0]] * rows, how, [f"k{i}" for i in range(rows)])
    frequencies = torch.bincount(torch.tensor([g.ids[0] for g in drawn]), minlength=128) / rows
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5
    top, order = logits.softmax(-1).sort(descending=True)
    kept = top[:5] / top[:5].sum()  # top-p acts on what top-k left
    kept = kept[: int((kept.cumsum(0) < 0.7).sum()) + 1]
    expected = torch.zeros(128).index_put((order[: len(kept)],), kept / kept.sum())
    assert 1 < len(kept) < 5
    torch.testing.assert_close(frequencies, expected, atol=0.03, rtol=0)


def test_every_eos_ends_a_completion_and_is_kept(model, tokenizer):
    rows = 32
    prompts, keys = [[2, 40 + i % 7] for i in range(rows)], [f"k{i}" for i in range(rows)]
    ends = list(range(100, 128))
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    try:
        done = generate(model, tokenizer, prompts, HOT, keys)
    finally:
        model.generation_config = own
    assert {g.finish_reason for g in done} == {"stop"}
    assert len({g.ids[-1] for g in done}) > 5
    assert len({len(g.ids) for g in done}) > 3
    for g in done:
        assert g.ids[-1] in ends
        assert not set(g.ids[:-1]) & set(ends)


def test_pads_are_no_part_of_a_completion_even_where_pad_is_eos(model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model_with_ends = tiny_model(vocab_size=128)
    model_with_ends.generation_config.eos_token_id = [1, *range(64, 128)]
    done = generate(model_with_ends, tokenizer, PROMPTS, HOT, KEYS)
    assert all(sum(i == 1 or i >= 64 for i in g.ids) == (g.finish_reason == "stop") for g in done)


def test_the_context_caps_each_row_by_its_own_prompt_and_says_so(warnings):
    model, tokenizer = tiny_model(vocab_size=128, max_position_embeddings=16), tiny_tokenizer()
    model.generation_config.eos_token_id = 127
    model.lm_head.weight.data[127] = 0
    done = generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
    assert [len(g.ids) for g in done] == [13, 14, 8, 11]
    assert {g.finish_reason for g in done} == {"length"}
    assert generate(model, tokenizer, PROMPTS[:1], GREEDY, KEYS[:1])[0] == done[0]
    assert len(warnings) == 1
    assert "max_new_tokens=24" in warnings[0]
    with pytest.raises(RacError, match="16 tokens fills the model's context of 16"):
        generate(model, tokenizer, [[2] * 16], GREEDY, ["k"])


def test_the_models_own_generation_config_does_not_leak_in_and_comes_back(warnings):
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    expected = generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
    own = GenerationConfig(
        eos_token_id=1, repetition_penalty=5.0, num_beams=3, min_new_tokens=20, suppress_tokens=[3]
    )
    model.generation_config = own
    model.train()
    assert generate(model, tokenizer, PROMPTS, GREEDY, KEYS) == expected
    assert model.generation_config is own
    assert model.training
    assert "repetition_penalty=5.0" in warnings[0]


def test_bad_prompts(model, tokenizer):
    with pytest.raises(RacError, match="no tokens"):
        generate(model, tokenizer, [[]], GREEDY, ["k"])
    with pytest.raises(RacError, match="token id 128, beyond the model's vocabulary of 128"):
        generate(model, tokenizer, [[2, 128]], GREEDY, ["k"])
    with pytest.raises(RacError, match="2 prompts but 1 keys"):
        generate(model, tokenizer, [[2], [2]], GREEDY, ["k"])
    assert generate(model, tokenizer, [], GREEDY, []) == []


def test_no_eos_anywhere():
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    model.generation_config.eos_token_id = None
    assert generation.eos_token_ids(model, tokenizer) == [1]
    tokenizer.eos_token = None
    with pytest.raises(RacError, match="EOS"):
        generate(model, tokenizer, PROMPTS, GREEDY, KEYS)
