"""The counted operations of pruning, against the products that are really made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_modifier.frontier.compressing import Group, Operations, groups_of, moments, solving
from rac_modifier.pruning import Pattern, alps, blocked, linalg, solve
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS
from tests.pruning.pruning_reference import correlated_problem


def groups(hidden: int, inner: int, keys: int, layers: int) -> list[Group]:
    block = [
        Group(hidden, (hidden, keys, keys)),
        Group(hidden, (hidden,)),
        Group(hidden, (inner, inner)),
        Group(inner, (hidden,)),
    ]
    return block * layers


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        factors = {"aten::mm": args[:2], "aten::addmm": args[1:3], "aten::addmm_": args[1:3]}.get(
            func._schema.name
        )
        if factors:
            self.operations += 2 * factors[0].numel() * factors[1].shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [8, 200])  # by a factor, and by the inverse
def test_products_of_the_solver_are_counted(
    rows: int, monkeypatch: pytest.MonkeyPatch, float32_products: None
) -> None:
    """Without those of LAPACK, which is what makes factors here and solves for the target: d^2 r of what is counted."""
    monkeypatch.setattr(blocked, "BLOCK", 32)
    monkeypatch.setattr(linalg, "_in_blocks", lambda matrix: False)
    columns = 160
    weight, hessian = correlated_problem(rows, columns, 400)
    assert alps._forms_inverse(columns, rows, 4) == (rows == 200)
    with Products() as made:
        (found,) = solve("alps", [weight], hessian, Pattern.n_of_m(2, 4))
    quadratic = 2 * 2 * columns**2 * rows  # of two errors
    left_out = (REFIT_STEPS - found.refit_steps + 1) * 2 * columns**2 * rows
    counted = solving(columns, rows)
    assert made.operations == pytest.approx(counted.products - left_out + quadratic, rel=1e-9)
    assert counted.float32 == 2 * columns**3 * (1 / 6 + 3 / (2 if rows == 200 else 6))
    assert ITERATIONS == 12  # in three stages


def test_tokens_that_do_not_reach_a_group_are_not_counted() -> None:
    assert moments(Group(64, (8,), 0.25), 400) == moments(Group(64, (8,)), 100)
    narrow, wide = moments(Group(64, (8,)), 100), moments(Group(64, (32,)), 100)
    assert (
        narrow.products == 4 * 100 * 64 * 8
    )  # the weights first: fewer operations than a square of the columns
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
