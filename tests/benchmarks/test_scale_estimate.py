"""The page of estimates has the tables that the command prints, and processes share what the code lets them share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "scale.md"
GUIDE = ROOT / "docs" / "scale.md"


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


def rows(table) -> dict[str, list[str]]:
    """The cells of a table by its first column, or by its first two where those are a model and a number of GPUs."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table
        if line.startswith("| ")
    ]
    return {f"{row[0]}, {row[1]}" if cells[0][1] == "GPUs" else row[0]: row[1:] for row in cells}


def gigabytes(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"GB": 1.0, "TB": 1000.0}[unit]


def minutes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"min": 1.0, "h": 60.0}[unit]


def test_the_guide_has_the_numbers_of_the_command(benchmark):
    guide = GUIDE.read_text()
    up = rows(benchmark.TABLES["Processes"]())
    won = rows(guide[guide.index("### What more GPUs win") :].splitlines())
    assert {name: won[name] for name in ("7B", "32B", "70B")} == {
        name: up[name][:4] for name in ("7B", "32B", "70B")
    }
    memory, hours = rows(benchmark.TABLES["Memory and disk"]()), rows(benchmark.TABLES["Hours"]())
    section = guide[guide.index("| model | machine |") : guide.index("While it is pruned")]
    machines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if "GPU" in line
    ]
    assert len(machines) == 4
    for name, machine, host, disk, time in machines:
        model, gpus = name.partition(",")[0].replace("B mixture", "B MoE"), machine.split()[0]
        _, _, weights, activations, _, on_disk = memory[model]
        assert gigabytes(host) == pytest.approx(
            gigabytes(weights) + gigabytes(activations), abs=0.5
        ), name
        assert gigabytes(disk) == pytest.approx(
            gigabytes(on_disk), abs=50 if "TB" in disk else 0.5
        ), name
        assert minutes(time) == pytest.approx(
            minutes(hours[f"{model}, {gpus}"][-1]), abs=30 if " h" in time else 0.5
        ), name


def test_the_guide_says_what_the_parts_that_stay_allow(benchmark):
    guide = " ".join(GUIDE.read_text().split())
    up, hours = rows(benchmark.TABLES["Processes"]()), rows(benchmark.TABLES["Hours"]())
    for name, limit in (("7B", 5), ("70B", 4)):
        assert f"near {limit} ({name})" in guide
        assert 1 / (float(up[name][-1].rstrip("%")) / 100) == pytest.approx(limit, abs=0.5)
    assert "six to seven times as fast as one" in guide
    for model in ("7B", "32B", "70B"):
        one, eight = (
            minutes(row[-1]) - minutes(row[-2])
            for row in (hours[f"{model}, 1"], hours[f"{model}, 8"])
        )
        assert 5.5 < one / eight < 7.5
    assert "with one it takes 3 h in place of 2" in guide
    assert round(minutes(hours["235B MoE, 1"][-1]) / 60) == 3
    assert round(minutes(hours["235B MoE, 8"][-1]) / 60) == 2
    assert "8 x 470 GB" in guide
    assert round(gigabytes(rows(benchmark.TABLES["Memory and disk"]())["235B MoE"][2])) == 470


def test_the_page_says_that_nothing_was_measured_on_a_gpu():
    assert "estimated" in PAGE.read_text()[:300]
    assert "nothing was measured on a GPU" in PAGE.read_text()[:600]


def test_the_models_have_their_published_sizes(benchmark):
    """Billions of parameters of Qwen2.5-7B, Qwen2.5-32B, Llama-3.3-70B and Qwen3-235B-A22B, in all and per token."""
    published = {
        "7B": (7.62, 7.62),
        "32B": (32.8, 32.8),
        "70B": (70.6, 70.6),
        "235B MoE": (235, 22),
    }
    for model in benchmark.MODELS[:4]:
        whole, active = published[model.name]
        assert model.shape.parameters / 1e9 == pytest.approx(whole, rel=0.01)
        assert model.shape.computing / 1e9 == pytest.approx(active, rel=0.02)


def test_processes_share_tokens_and_whole_groups(benchmark):
    batches = -(-benchmark.TOKENS // benchmark.BATCH)
    two = benchmark.GroupTimes(
        benchmark.Group(8, (4, 4)), tokens=100.0, summed=0, sent=0, factors=3.0, per_row=0.5
    )
    one = benchmark.GroupTimes(
        benchmark.Group(16, (4,)), tokens=50.0, summed=0, sent=0, factors=2.0, per_row=1.0
    )
    assert benchmark.layer_seconds([two, one], 1) == 150 + (3 + 8 * 0.5) + (2 + 4 * 1.0)
    # one group after the other, one process is busy
    assert batches == 245  # 24 lanes, five of 11 batches and the others of 10
    assert benchmark.layer_seconds([two, one], 2) == pytest.approx(
        150 * (3 * 11 + 9 * 10) / 245 + 7 + 6
    )
    assert benchmark.layer_seconds([two, one], 16) == pytest.approx(
        150 * (11 + 10) / 245 + 7 + 6
    )  # 16 lanes, then 8
    assert benchmark.layer_seconds([two, one], 64) == pytest.approx(150 * 4 / 245 + 7 + 6)
    # layer by layer, a process has each group
    assert benchmark.layer_seconds([two, one], 3, together=True) == pytest.approx(
        150 * 82 / 245 + max(7, 6)
    )


def test_what_goes_between_processes_takes_time(benchmark):
    moved = benchmark.GroupTimes(
        benchmark.Group(8, (4,)), 0.0, summed=3 * 10**11, sent=6 * 10**11, factors=0.0, per_row=0.0
    )
    assert benchmark.layer_seconds([moved], 1) == 0.0
    # six rounds of four lanes, and the sum is sent to all
    assert benchmark.layer_seconds([moved], 4) == pytest.approx(
        (7 * 3 / 4 * 3 + 6) * 1e11 / benchmark.LINK
    )


def test_no_speed_up_is_above_the_number_of_processes(benchmark):
    for seconds in benchmark.simulated().values():
        ups = [seconds[0] / each for each in seconds]
        assert all(up <= ranks * 1.0001 for up, ranks in zip(ups, benchmark.RANKS, strict=True))
        assert ups == sorted(ups)


def test_what_stays_is_that_of_amdahl(benchmark):
    """A tenth is not divided: 64 processes are 1 / (0.1 + 0.9 / 64) times as fast."""
    rows = benchmark.ranks_table(
        {"made up": [100 * (0.1 + 0.9 / ranks) for ranks in benchmark.RANKS]}
    )
    assert list(rows)[-1].endswith(" 8.8 | 10.0% |")
