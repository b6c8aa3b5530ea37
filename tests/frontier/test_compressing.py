"""The counted operations of pruning: against a count of an earlier program, and of a product that is really made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_modifier.frontier.compressing import PASSES, Group, Operations, groups_of, moments, solving

PAGE = (Path(__file__).parents[2] / "docs" / "results" / "pruning_time.md").read_text()
# hidden, inner, keys, layers of DeepSeek-R1-Distill-Qwen
SHAPES = {"1.5B": (1536, 8960, 256, 28), "7B": (3584, 18944, 512, 28), "32B": (5120, 27648, 1024, 64)}


def groups(hidden: int, inner: int, keys: int, layers: int) -> list[Group]:
    block = [
        Group(hidden, (hidden, keys, keys)),
        Group(hidden, (hidden,)),
        Group(hidden, (inner, inner)),
        Group(inner, (hidden,)),
    ]
    return block * layers


@pytest.mark.parametrize("tokens", [1_000_000, 131_072, 16_384])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_count_is_that_of_the_page(shape: str, tokens: int) -> None:
    """The page's was made by an earlier program, which described the solver by itself; the two differ by a step."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {shape} | {tokens:,} | quality |"))
    _, _, _, _, total, _, _, passes, statistics, solver, _ = (cell.strip() for cell in row.split("|"))
    found = groups(*SHAPES[shape])
    parts = [
        PASSES * 2 * tokens * sum(group.weights for group in found),
        sum(sum(vars(moments(group, tokens)).values()) for group in found),
        sum(sum(vars(solving(group.columns, sum(group.rows))).values()) for group in found),
    ]
    assert sum(parts) == pytest.approx(2 * float(total), rel=0.05)
    for share, operations in zip((passes, statistics, solver), parts, strict=True):
        assert operations / sum(parts) == pytest.approx(float(share.removesuffix("%")) / 100, abs=0.02)


def test_tokens_that_do_not_reach_a_group_are_not_counted() -> None:
    assert moments(Group(64, (8,), 0.25), 400) == moments(Group(64, (8,)), 100)
    narrow, wide = moments(Group(64, (8,)), 100), moments(Group(64, (32,)), 100)
    assert narrow.products == 4 * 100 * 64 * 8  # the weights first: fewer operations than a square of the columns
    assert wide.products == 2 * 100 * 64 * 64 + 2 * 64 * 64 * 32
    assert narrow.float32 == 2 * 100 * 64 * 64  # one block row


def test_a_device_without_fast_bfloat16_takes_float32() -> None:
    work = Operations(100.0, 10.0) + Operations(20.0, 2.0)
    assert work.seconds(60.0, 6.0) == 2.0 + 2.0
    assert work.seconds(1.0, 6.0) == 20.0 + 2.0


def test_the_groups_of_a_model() -> None:
    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    found = groups_of(model.named_modules(), model.get_output_embeddings())
    assert list(found) == groups(32, 48, 16, 2)
