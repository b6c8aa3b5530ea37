"""The page of estimates has the tables that the command prints, and processes share what the code lets them share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "scale.md"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import scale_estimate

        yield scale_estimate


def test_the_page_has_the_tables_of_the_command(benchmark):
    """If this fails: PYTHONPATH=. python benchmarks/scale_estimate.py."""
    page = PAGE.read_text()
    for title, table in benchmark.TABLES.items():
        section = page[page.index(f"\n## {title}") :]
        assert "\n".join(table()) in section, title


def test_the_page_says_that_nothing_was_measured_on_a_gpu():
    assert "estimated" in PAGE.read_text()[:300]
    assert "nothing was measured on a GPU" in PAGE.read_text()[:600]


def test_the_models_have_their_published_sizes(benchmark):
    """Billions of parameters of Qwen2.5-7B, Qwen2.5-32B, Llama-3.3-70B and Qwen3-235B-A22B, in all and per token."""
    published = {"7B": (7.62, 7.62), "32B": (32.8, 32.8), "70B": (70.6, 70.6), "235B MoE": (235, 22)}
    for model in benchmark.MODELS[:4]:
        whole, active = published[model.name]
        assert model.shape.parameters / 1e9 == pytest.approx(whole, rel=0.01)
        assert model.shape.computing / 1e9 == pytest.approx(active, rel=0.02)


def test_processes_share_tokens_and_whole_groups(benchmark):
    batches = -(-benchmark.TOKENS // benchmark.BATCH)
    two = benchmark.GroupTimes(benchmark.Group(8, (4, 4)), tokens=100.0, summed=0, sent=0, factors=3.0, per_row=0.5)
    one = benchmark.GroupTimes(benchmark.Group(16, (4,)), tokens=50.0, summed=0, sent=0, factors=2.0, per_row=1.0)
    assert benchmark.layer_seconds([two, one], 1) == 150 + (3 + 8 * 0.5) + (2 + 4 * 1.0)
    # one group after the other, one process is busy
    assert batches == 245  # 24 lanes, five of 11 batches and the others of 10
    assert benchmark.layer_seconds([two, one], 2) == pytest.approx(150 * (3 * 11 + 9 * 10) / 245 + 7 + 6)
    assert benchmark.layer_seconds([two, one], 16) == pytest.approx(150 * (11 + 10) / 245 + 7 + 6)  # 16 lanes, then 8
    assert benchmark.layer_seconds([two, one], 64) == pytest.approx(150 * 4 / 245 + 7 + 6)
    # layer by layer, a process has each group
    assert benchmark.layer_seconds([two, one], 3, together=True) == pytest.approx(150 * 82 / 245 + max(7, 6))


def test_what_goes_between_processes_takes_time(benchmark):
    moved = benchmark.GroupTimes(
        benchmark.Group(8, (4,)), 0.0, summed=3 * 10**11, sent=6 * 10**11, factors=0.0, per_row=0.0
    )
    assert benchmark.layer_seconds([moved], 1) == 0.0
    # six rounds of four lanes, and the sum is sent to all
    assert benchmark.layer_seconds([moved], 4) == pytest.approx((7 * 3 / 4 * 3 + 6) * 1e11 / benchmark.LINK)


def test_no_speed_up_is_above_the_number_of_processes(benchmark):
    for seconds in benchmark.simulated().values():
        ups = [seconds[0] / each for each in seconds]
        assert all(up <= ranks * 1.0001 for up, ranks in zip(ups, benchmark.RANKS, strict=True))
        assert ups == sorted(ups)


def test_what_stays_is_that_of_amdahl(benchmark):
    """A tenth is not divided: 64 processes are 1 / (0.1 + 0.9 / 64) times as fast."""
    rows = benchmark.ranks_table({"made up": [100 * (0.1 + 0.9 / ranks) for ranks in benchmark.RANKS]})
    assert list(rows)[-1].endswith(" 8.8 | 10.0% |")
