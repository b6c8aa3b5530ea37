"""The page of predicted times has the tables that the command prints, and measured times stand beside predicted ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.errors import RacError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "gpu.md"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_predicted

    return gpu_predicted


def test_the_page_has_the_tables_of_the_command(benchmark):
    """If this fails: PYTHONPATH=. python benchmarks/gpu_predicted.py."""
    page = PAGE.read_text()
    for title, table in benchmark.TABLES.items():
        section = page[page.index(f"\n## {title}\n") :]
        assert "\n".join(table()) in section, title


def test_the_page_says_that_nothing_was_measured():
    assert "Predicted, nothing was measured on a GPU" in PAGE.read_text()[:200]


def test_a_model_takes_its_layers_times(benchmark):
    """bf16 of the 8B shape on an H100 at 1 token: 218,103,808 weights per layer at 2 bytes, x and the results of four
    products, 2 us each."""
    moved = 2 * 218_103_808 + 2 * (6144 + 4096 + 4096 + 4096 + 28672 + 4096 + 4096 + 14336)
    expected = 32 * (1e3 * moved / 3.35e12 / 0.85 + 4 * 0.002)
    assert benchmark.times(benchmark.card_of("h100"), "8B", 1)["bf16"] == pytest.approx(expected)


def test_measured_times_stand_beside_predicted_ones(benchmark, tmp_path):
    shape = {"layer": "o", "rows": 4096, "columns": 4096, "tokens": 8}
    rows = [shape | {"contender": name, "us": 12.345} for name in benchmark.CONTENDERS]
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "NVIDIA L4", "times": rows}))
    lines = list(benchmark.beside(tmp_path / "gpu.json"))
    assert lines[0] == "L4, gpu.json"
    assert len(lines) == 2 + len(rows)
    dense = (2 * 4096 * 4096 + 2 * 8 * 8192) / 0.3e12 / 0.85 * 1e6 + 2
    assert lines[2] == f"| o | 8 | dense bf16 | {dense:.1f} | 12.3 | memory |"


def test_times_of_a_card_that_is_not_known_are_an_error(benchmark, tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps({"device": "NVIDIA T4", "times": []}))
    with pytest.raises(
        RacError, match=r'device "NVIDIA T4" is not in the table of cards, which has NVIDIA A100'
    ):
        list(benchmark.beside(tmp_path / "gpu.json"))


def test_a_run_that_ended_before_anything_was_timed_is_an_error(benchmark, tmp_path):
    for record, reason in (
        ({}, "the run ended before"),
        ({"times": [], "error": "bf16: wrong by 3"}, "bf16: wrong by 3"),
    ):
        (tmp_path / "gpu.json").write_text(json.dumps({"device": "NVIDIA L4"} | record))
        with pytest.raises(
            RacError, match=rf"nothing was timed \({reason}\); run make gpu-check again"
        ):
            list(benchmark.beside(tmp_path / "gpu.json"))


def test_the_names_are_those_of_the_check(benchmark):
    """`make gpu-check` writes them."""
    import gpu_contenders
    import gpu_kernels

    assert set(benchmark.CONTENDERS) == {
        *gpu_kernels.FORMATS,
        *gpu_contenders.CONTENDERS,
        "dense bf16",
    } - {"2:4 by cuSPARSELt"}
    assert benchmark.MODELS["8B"][0] == gpu_kernels.LAYERS
