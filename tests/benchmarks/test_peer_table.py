"""The rows and the table of peers.py."""

from __future__ import annotations

from tests.benchmarks.conftest import KEYS


def test_the_kl_is_that_of_the_format(tables):
    measured = {"Q4_0": 0.1, "50 % + int4": 0.2, "int4": 0.04, "int3": 0.13, "50 % + int8": 0.15}
    expected = {
        "llama.cpp Q4_0": 0.1,
        "llama.cpp Q8_0": None,
        "linears, 50 % + int4, head int8": 0.2,
        "served, 50 % + int8, head int8": 0.15,
        "linears, dense int4, head int4": 0.04,
        "linears, dense int3, head int4": 0.13,
        "served, dense int3, ours, head int4": 0.13,
        "linears, 70 % + int4, head int4": None,
        "vLLM, dense bfloat16": 0.0,
        "vLLM, dense int8 (W8A8)": None,
        "OpenVINO linears, int4, head int4": None,
        "torchao linears, int4, head int4": None,
    }
    assert {name: tables.kl_of(name, measured) for name in expected} == expected


def test_ratios_are_of_one_round_and_medians_of_all(tables):
    figures = tables.Figures
    base = {1: figures(8 * 10**8, 40.0, 2.0, 14.0), 2: figures(8 * 10**8, 80.0, 4.0, 7.0)}
    other = {
        2: figures(6 * 10**8, 60.0, gigabytes_per_s=20.0),
        1: figures(6 * 10**8, 20.0, gigabytes_per_s=40.0),
    }
    rows = [
        tables.row("llama.cpp Q4_0", base, {}, None),
        tables.row("linears, dense int4, head int4", other, {"int4": 0.04}, None),
    ]
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["ms_per_token"] for row in rows] == [60.0, 40.0]
    first, second = tables.table(rows).splitlines()[2:]
    assert (
        first
        == "| llama.cpp Q4_0 | 0.800 | 13.3 | - | 3.00 | 60.0 | 10.5 | 1.00x (1.00-1.00) | 1.00x (1.00-1.00) | - |"
    )
    linears = "| linears, dense int4, head int4 | 0.600 | 15.0 | 50% | - | 40.0 | - | 1.67x (1.33-2.00) | - | 0.040 |"
    assert second == linears
    python = {1: figures(1, 20.0, 1.0, 21.0), 2: figures(1, 20.0, 1.0, 14.0)}
    whole = tables.row("in Python, 50 % + int4, head int4", python, {}, None)
    assert "| 1.75x (1.50-2.00) | - |" in tables.table([rows[0], whole]).splitlines()[-1]


def test_a_missing_round_leaves_the_others_paired(tables):
    figures = tables.Figures
    base = tables.row("llama.cpp Q4_0", {2: figures(8 * 10**8, 80.0)}, {}, "failed in round 3: why")
    other = {1: figures(6 * 10**8, 20.0), 2: figures(6 * 10**8, 60.0)}
    ours = tables.row("linears, dense int4, head int4", other, {}, None)
    absent = tables.row("llama.cpp Q8_0", {}, {"Q8_0": 0.1}, "not installed: gguf")
    assert (absent["weight_bytes"], absent["ms_per_token"], absent["runs"]) == (None, None, [])
    lines = tables.table([base, ours, absent]).splitlines()
    assert "| 1.33x (1.33-1.33) |" in lines[3]
    assert lines[4] == "| llama.cpp Q8_0 |" + " - |" * 9
    assert lines[5:] == [
        "",
        "- llama.cpp Q4_0: failed in round 3: why",
        "- llama.cpp Q8_0: not installed: gguf",
    ]
    without_base = tables.table([tables.row("llama.cpp Q4_0", {}, {}, "why"), ours]).splitlines()
    assert without_base[3].endswith("| - | - | - |")
