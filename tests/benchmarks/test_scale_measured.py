"""Measured parts of a layer and of a whole run: what is scaled by what, and which parts processes divide."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale_parts

    return scale_parts


@pytest.fixture
def measured(parts):
    import scale_measured

    return scale_measured


def test_parts_are_scaled_to_the_whole_model(parts, monkeypatch, tmp_path):
    """On a clock of its own: saving takes 1 s, loading 2, packing 3, a layer 4, and comparing 10."""
    ticks = iter([0, 1, 1, 3, 3, 6, 6, 10, 10, 20])
    monkeypatch.setattr(parts, "time", SimpleNamespace(process_time=lambda: float(next(ticks))))
    monkeypatch.setattr(parts, "LENGTH", 64)
    shape = parts.Model(
        "tiny", layers=6, hidden=128, inner=256, queries=128, keys=64, vocabulary=512
    )
    found = parts.parts(shape, tmp_path / "model")
    linear = 128 * (128 + 64 + 64) + 128 * 128 + 3 * 128 * 256
    other = 128 + 64 + 64 + 2 * 128  # biases and norms of a layer
    here, embedding = 4 * (linear + other) + 256 * 128 + 128, 512 * 128
    whole = 6 * linear + embedding
    assert found.forward == 4 / 64
    assert found.alone == pytest.approx(
        {
            "saving": 1 * whole / here,
            "loading": 2 * whole / here,
            "packing": 3 * 6 / 4 + (1 + 2) * embedding / here,
            # of two sets of traces: six layers of the dense and of the pruned model, and the heads
            "held-out divergence": 2 * (2 * 6 * 4 + (10 - 4)),
        }
    )
    written = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert written < 4 * here * 0.75, "not packed"


def test_attention_takes_the_place_of_the_products(measured, monkeypatch):
    group = measured.SHAPE
    first, second = list(group.layer())[:2]
    times = [
        measured.GroupTimes(first, 100.0, 0, 0, factors=3.0, per_row=0.0, products=80.0),
        measured.GroupTimes(second, 50.0, 0, 0, factors=2.0, per_row=0.0, products=45.0),
    ]
    monkeypatch.setattr(measured, "TOKENS", 1000)
    whole = measured.Parts(
        0.25, {"saving": 7.0, "loading": 4.0, "packing": 1.0, "held-out divergence": 8.0}
    )
    attending = measured.with_attention(times, whole)
    assert [each.tokens for each in attending] == [
        20.0 + 2 * 1000 * 0.25,
        5.0,
    ]  # in the dense and in the pruned model
    shape = measured.Model("tiny", 10, 128, 256, 128, 64, 512)
    assert measured.whole_seconds(shape, attending, whole, 1) == pytest.approx(
        10 * (520 + 5 + 3 + 2) + 20
    )
    assert list(measured.parts_table(shape, attending, whole))[2:] == [
        "| forward passes, with attention | 5,000.0 s | each its batches |",
        "| statistics | 250.0 s | each its batches |",
        "| solving | 50.0 s | one per group |",
        "| saving | 7.0 s | the first |",
        "| loading | 4.0 s | each the whole |",
        "| packing | 1.0 s | the first |",
        "| held-out divergence | 8.0 s | the first |",
    ]


def test_products_are_a_part_of_the_tokens(measured, capsys):
    """Of each group of a tiny layer, scaled to the tokens of the estimates."""
    shape = measured.Model("tiny", 1, 128, 256, 128, 64, 512)
    times = measured.measured(shape, 256)
    assert [each.group.columns for each in times] == [128, 128, 128, 256]
    assert all(0 <= each.products <= each.tokens for each in times)
    assert len(capsys.readouterr().out.splitlines()) == 4
