"""A grid as the plan of what will run."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rac_modifier.cli.forecast import _autorounded, check, forecast, plan_of
from rac_modifier.errors import RacError
from rac_modifier.settings.grid import Grid, GridEvaluation, load_grid, plan_rows


@pytest.fixture(scope="module")
def skeleton():
    with torch.device("meta"):
        return Qwen2ForCausalLM(
            Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=99)
        )


def test_the_grid_for_one_gpu(skeleton) -> None:
    grid = load_grid("r1_distill_1_5b")
    plan = plan_of(skeleton, plan_rows(grid, "r1"), grid.evaluation)
    assert (plan.rows, plan.tokens, plan.served) == (4, 262144, True)
    assert (plan.traces.answers, plan.traces.cap, plan.traces.served) == (32, 8192, True)
    assert [(one.name, one.answers, one.cap, one.at_once, one.served) for one in plan.asked] == [
        ("answers and KL", 64, 4096, 64, False),
        ("tokens per second", 64, 4096, 256, True),
        ("math-500", 500 * 4, 32768, 256, True),
        ("aime24", 30 * 64, 32768, 256, True),
    ]


def test_rows_that_train(skeleton) -> None:
    int4 = {"config_groups": {"w": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}
    grid = Grid(
        shared={
            "traces": {"problems": {"source": "arithmetic"}, "sampling": {"max_new_tokens": 100}},
            "calibration": {"tokens": 1000},
        },
        evaluation=GridEvaluation(source="arithmetic"),
        rows=[
            {"label": "a", "recipe": {"ReasoningAwareSparseGPTModifier": {"sparsity": 0.5}}},
            {
                "label": "b",
                "recipe": {"ReasoningAwareSparseGPTModifier": {"sparsity": 0.5}},
                "set": {"recover": {"tokens": 3000, "passes": 2, "held_out_tokens": 500}},
            },
            {
                "label": "c",
                "recipe": {"ReasoningAwareCalibrationModifier": {}, "AutoRoundModifier": int4},
            },
            {
                "label": "d",
                "recipe": {
                    "ReasoningAwareCalibrationModifier": {},
                    "AutoRoundModifier": {**int4, "iters": 3, "batch_size": 2},
                },
            },
        ],
    )
    plan = plan_of(skeleton, plan_rows(grid, "rows"), grid.evaluation)
    assert (plan.recovered, plan.autorounded) == (6000, 200 * 8 * 100 + 3 * 2 * 100)
    assert (plan.tokens, plan.traces.answers) == (1000, 45)


def test_rows_for_autoround_have_at_most_2048_tokens() -> None:
    recipe = {"stage": {"modifiers": {"AutoRoundModifier": {"iters": 3, "batch_size": 2}}}}
    assert _autorounded(recipe, 5000) == 3 * 2 * 2048
    assert _autorounded(recipe, 100) == 3 * 2 * 100


def test_a_grid_without_a_server(skeleton, tmp_path: Path) -> None:
    grid = load_grid("small")
    rows = plan_rows(grid, "small")
    plan = plan_of(skeleton, rows, grid.evaluation)
    assert (plan.served, plan.traces.served, [one.served for one in plan.asked]) == (
        False,
        False,
        [False],
    )
    estimate, *room = forecast(plan, tmp_path, keep_models=True)
    assert estimate.startswith("Estimated, not measured")
    assert len(room) == len(check(plan, tmp_path, keep_models=True)) == 3
    assert [line.partition(":")[0] for line in room] == [
        "device" if torch.cuda.is_available() else "host",
        "host",
        "disk",
    ]
    with pytest.raises(RacError, match="no preset 'mmlu'"):
        plan_of(skeleton, rows, GridEvaluation(benchmarks=[{"preset": "mmlu"}]))
