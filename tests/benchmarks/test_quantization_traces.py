"""What the benchmark compares: one scheme on three calibrations, and differences paired over the answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rac_modifier.settings.recipe import check_entry, find_named_entry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import quantization_traces

        yield quantization_traces


@pytest.mark.parametrize("label", ["GPTQ int3", "GPTQ int2", "int2, asymmetric"])
def test_the_recipes_differ_in_what_is_calibrated_on_alone(benchmark, label):
    grid = yaml.safe_load(benchmark.GRID.read_text())
    recipes = [benchmark.recipe_of(grid, label, kind, 1000, 3) for kind in benchmark.CALIBRATIONS]
    budgets = []
    for recipe in recipes:
        name, entry = find_named_entry(recipe, label)
        checked = check_entry(entry, label, name)  # nothing is idle
        budgets.append(
            (
                checked.calibration.tokens,
                checked.calibration.seed,
                sorted(checked.calibration.mixture),
            )
        )
        for part in ("traces", "calibration"):
            entry.pop(part, None)
    assert recipes[0] == recipes[1] == recipes[2]
    sources = ["arithmetic", "instructions"]
    assert [mixture for *_, mixture in budgets] == [
        [f"traces:{source}" for source in sources],
        ["generic"],
        [f"prompts:{source}" for source in sources],
    ]
    assert {tuple(rest) for *rest, _ in budgets} == {(1000, 3)}


def test_means_count_tokens_and_differences_are_paired(benchmark):
    traces, prompts = {"kl": [[0.1, 10], [0.4, 30]]}, {"kl": [[0.3, 10], [0.6, 30]]}
    assert benchmark.weighted(traces)[0] == pytest.approx((0.1 * 10 + 0.4 * 30) / 40)
    assert benchmark.weighted(traces)[1] > 0.05
    mean, error = benchmark.weighted(prompts, traces)
    assert mean == pytest.approx(0.2)
    assert error == pytest.approx(0.0, abs=1e-12)
