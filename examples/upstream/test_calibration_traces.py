# SPDX-License-Identifier: Apache-2.0
"""Traces of a tiny random model: exact ids, the budget, going on after a kill, GPTQ on them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.upstream.calibration_traces import (
    SamplingOptions,
    Trace,
    generate_calibration_traces,
)

LETTERS = ["<pad>", "<eos>", "<user>", *map(chr, range(32, 127))]
TEMPLATE = "<user>{{ messages[-1].content }}"
PROBLEMS = [f"What is {a} + {a * a}?" for a in range(40)]
OPTIONS = SamplingOptions(max_new_tokens=24, temperature=1.2, top_p=1.0, batch_size=4)


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.add_special_tokens(LETTERS[:3])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )


def tiny_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(LETTERS)}
    config = LlamaConfig(**sizes, **heads, eos_token_id=1, initializer_range=0.15)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@torch.no_grad()
def greedy(model, prompt, most):
    """One sequence at a time, without a cache and without padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] != 1):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_rows_are_prompt_and_completion_with_the_eos(model, tokenizer):
    options = replace(OPTIONS, temperature=0)
    data = generate_calibration_traces(model, tokenizer, PROBLEMS, tokens=700, options=options)
    for problem, row in zip(PROBLEMS, data, strict=False):
        prompt = [2, *(LETTERS.index(c) for c in problem)]
        expected = greedy(model, prompt, 24)
        assert row["input_ids"] == expected
        assert row["attention_mask"] == [1] * len(expected)
    lengths = [len(row["input_ids"]) for row in data]
    assert sum(lengths) >= 700 > sum(lengths[:-1])
    record = json.loads(data.info.description)
    assert record["tokens"] == sum(lengths)
    assert record["finished"] == sum(row["input_ids"][-1] == 1 for row in data)


def test_packed_rows_hold_the_same_tokens(model, tokenizer):
    rows, whole = (
        generate_calibration_traces(
            model, tokenizer, PROBLEMS, tokens=500, options=OPTIONS, row_tokens=n
        )["input_ids"]
        for n in (32, None)
    )
    joined = [i for row in whole for i in row]
    assert {len(row) for row in rows} == {32}
    assert [i for row in rows for i in row] == joined[: len(joined) // 32 * 32]


def test_a_call_goes_on_after_a_kill_with_the_same_rows(model, tokenizer, tmp_path):
    def run(name, problems=PROBLEMS, tokens=900, **changes):
        return generate_calibration_traces(
            changes.pop("model", model),
            tokenizer,
            problems,
            tokens=tokens,
            options=replace(OPTIONS, **changes),
            store=tmp_path / name,
        )["input_ids"]

    whole = run("whole.jsonl")
    content = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "torn.jsonl").write_bytes(content[: len(content) // 2])
    assert run("torn.jsonl") == whole
    assert (tmp_path / "torn.jsonl").read_bytes() == content
    assert run("whole.jsonl", tokens=100) == whole[: len(run("whole.jsonl", tokens=100))]
    for changes in ({"model": tiny_model(1)}, {"seed": 1}, {"problems": PROBLEMS[::-1]}):
        with pytest.raises(ValueError, match="another"):
            run("whole.jsonl", **changes)
    assert (tmp_path / "whole.jsonl").read_bytes() == content


def test_a_filter_and_a_sampler_of_ones_own(model, tokenizer):
    asked = []

    def sampler(prompts, seeds):
        asked.extend(seeds)
        return [[10, 11, 1] if len(asked) % 8 else [7, 8] * 40 for _ in prompts]

    data = generate_calibration_traces(
        model,
        tokenizer,
        PROBLEMS,
        tokens=300,
        options=OPTIONS,
        sampler=sampler,
        filter_fn=lambda problem, completion: "2" not in problem,
    )
    assert len(set(asked)) == len(asked)
    kept = [p for p in PROBLEMS if "2" not in p]
    for problem, row in zip(kept, data, strict=False):
        prompt = [2, *(LETTERS.index(c) for c in problem)]
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["input_ids"][len(prompt) :] in ([10, 11, 1], [7, 8])
    with pytest.raises(ValueError, match="give more problems"):
        generate_calibration_traces(model, tokenizer, [], tokens=300)


@pytest.mark.parametrize(
    ("ids", "finished", "kept"),
    [
        ([5, 6] * 40, False, 2),
        ([5, 6] * 40, True, 80),
        ([*range(30), *[9] * 70], False, 31),
        ([*range(200)], False, 200),
    ],
)
def test_a_repeated_tail_is_cut_to_its_first_copy(ids, finished, kept):
    assert Trace([1], ids, finished).without_repeated_tail().completion == ids[:kept]


def test_gptq_of_llmcompressor_calibrates_on_them(model, tokenizer, tmp_path):
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.gptq import GPTQModifier

    data = generate_calibration_traces(
        model, tokenizer, PROBLEMS, tokens=1000, options=OPTIONS, row_tokens=32
    )
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    seen = []
    copy = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    embedding = copy.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()))
    llmcompressor.oneshot(
        model=copy,
        dataset=data,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=32,
        num_calibration_samples=len(data),
        output_dir=str(tmp_path / "int4"),
    )
    rows = set(map(tuple, data["input_ids"]))
    assert {tuple(row) for row in seen} >= rows
    assert Path(tmp_path / "int4" / "config.json").exists()
