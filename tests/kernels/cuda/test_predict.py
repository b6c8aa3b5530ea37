"""The predicted times: one layer computed by hand, and what must hold for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import CARDS, card_of
from rac_modifier.kernels.cuda.instruction_counts import COUNTS
from rac_modifier.kernels.cuda.layout import (
    ALL,
    BF16,
    INT4,
    UNSTRUCTURED,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
)
from rac_modifier.kernels.cuda.predict import (
    DENSE,
    Time,
    check_tokens,
    cusparselt_time,
    dense_time,
    over_dense,
    prompt_times,
    sparse_time,
    time_of,
)
from rac_modifier.kernels.cuda.programs import decode_program

shapes = st.tuples(
    st.integers(1, 2000).map(lambda n: 16 * n), st.integers(1, 512).map(lambda n: 64 * n)
)
tokens = st.integers(1, 128)
cards = st.sampled_from(CARDS)


def test_an_int4_layer_of_an_h100_by_hand(monkeypatch):
    """[28672, 4096] times 8 tokens: four row tiles and one token tile per block, so 448 blocks of 64 rows, at most 4 per
    multiprocessor. A unit, 16 rows and 128 columns, has 512 bytes of values, 256 of metadata, 32 of scales: 800."""
    monkeypatch.setitem(
        COUNTS, ("int4 g128", "sm_90"), ((0, 0),) * 6 + ((329, 375),) + ((0, 0),) * 2
    )
    time = sparse_time(card_of("h100"), INT4[128], 28672, 4096, 8)
    weights, x, out = 1792 * 32 * 800, 8 * 4096 * 2, 8 * 28672 * 2
    assert time.memory == pytest.approx((weights + x + out) / 3.35e12 / 0.85 * 1e6)
    per_block = 4 * 32 * 800
    cycle = 1e6 / 1.83e9 / 0.85
    assert time.cache == pytest.approx(4 * (per_block + x) / 35 * cycle)
    assert time.shared == pytest.approx(4 * 2 * (per_block + x) / 128 * cycle)
    assert time.instructions == pytest.approx(
        4 * (32 * 329 + 4 * 375) / 4 * cycle
    )  # a chunk has 128 columns
    assert time.tensor_cores == pytest.approx(4 * 64 * 4096 * 8 / 2 / 1024 * cycle)
    assert time.bound == "memory"
    assert time.total == pytest.approx(time.memory + 2.0)


def test_a_bf16_layer_of_a_4090_by_hand(monkeypatch):
    """[1000, 1000] times 20 tokens, padded to 63 tiles of 16 rows, 1024 columns and 32 tokens: one row tile per block, since
    128 multiprocessors have no second. A unit has 64 columns, 1152 bytes, and is a chunk."""
    monkeypatch.setitem(COUNTS, ("bf16", "sm_89"), ((0, 0),) * 2 + ((83, 565),) + ((0, 0),) * 6)
    time = sparse_time(card_of("4090"), BF16, 1000, 1000, 20)
    assert time.memory == pytest.approx((63 * 16 * 1152 + 20 * 2000 * 2) / 1.008e12 / 0.85 * 1e6)
    cycle = 1e6 / 2.52e9 / 0.85
    assert time.cache == pytest.approx((16 * 1152 + 20 * 1000 * 2) / 15 * cycle)
    assert time.shared == pytest.approx(2 * (16 * 1152 + 32 * 1024 * 2) / 128 * cycle)
    assert time.instructions == pytest.approx((16 * 83 + 4 * 565) / 4 * cycle)
    assert time.tensor_cores == pytest.approx(16 * 1024 * 32 / 2 / 256 * cycle)


def test_a_layer_of_any_pattern_by_hand(monkeypatch):
    """[4096, 4096] times 8 tokens at 30 %: 128 blocks of 32 rows, one per multiprocessor, each with 128 steps. Of a segment's
    512 places a stream stores 153.6, and the longest of 64 2.35 standard deviations more, padded by 3.5; a mask per step, and
    its counts."""
    monkeypatch.setitem(COUNTS, ("unstructured", "sm_90"), ((204, 372), (0, 0), (0, 0)))
    time = sparse_time(card_of("h100"), UNSTRUCTURED, 4096, 4096, 8, 0.3)
    lines = 512 * 0.3 + 2.35 * (512 * 0.3 * 0.7) ** 0.5 + 3.5
    block = 32 * 4 + 4 * (16 + 128 * (1 + 32 + lines))
    assert time.memory == pytest.approx(
        (128 * block + 8 * 8192 * 2) / 3.35e12 / 0.85 * 1e6, rel=1e-4
    )
    cycle = 1e6 / 1.83e9 / 0.85
    assert time.cache == pytest.approx((block * 13 / 12 + 8 * 8192) / 35 * cycle, rel=1e-4)
    loads = 128 * 33 * 128  # of values and masks
    assert time.shared == pytest.approx(
        (block * 13 / 12 + loads + 2 * 8 * 8192) / 128 * cycle, rel=1e-4
    )
    assert time.instructions == pytest.approx((128 * 204 + 4 * 372) / 4 * cycle)
    assert time.tensor_cores == pytest.approx(32 * 4096 * 8 / 1024 * cycle)


def test_an_int8_layer_by_hand(monkeypatch):
    """[4096, 4096] times 8 tokens at 50 %: as above, in 64 steps, with 2 lines of masks each and an order and a scale per row. Of
    a segment's 1024 places a stream stores 512, and the longest of 32 2.07 standard deviations more; four are a line; 0.625 is
    the mean share of the last line that is not read; a window reads one line more; padded by 3.5."""
    monkeypatch.setitem(COUNTS, ("unstructured int8", "sm_90"), ((336, 352), (0, 0), (0, 0)))
    time = sparse_time(card_of("h100"), UNSTRUCTURED_INT8, 4096, 4096, 8, 0.5)
    lines = (512 + 2.07 * 16) / 4 + 0.625 + 1 + 3.5
    block = 2 * 32 * 4 + 4 * (16 + 128 * (1 + 16 * 2 + lines))
    assert time.memory == pytest.approx(
        (128 * block + 8 * 8192 * 2) / 3.35e12 / 0.85 * 1e6, rel=1e-4
    )
    cycle = 1e6 / 1.83e9 / 0.85
    assert time.cache == pytest.approx((block * 65 / 64 + 8 * 8192) / 35 * cycle, rel=1e-4)
    loads = 64 * (2 * 16 + 2) * 128  # of windows and masks
    assert time.shared == pytest.approx(
        (block * 65 / 64 + loads + 2 * 8 * 8192) / 128 * cycle, rel=1e-4
    )
    assert time.instructions == pytest.approx((64 * 336 + 4 * 352) / 4 * cycle)
    assert time.tensor_cores == pytest.approx(32 * 4096 * 8 / 1024 * cycle)


def test_an_int4_layer_of_any_pattern_by_hand(monkeypatch):
    """[4096, 4096] times 8 tokens at 50 %: as above; eight values are a line, of whose last 0.5625 is the mean share that is not
    read; a line of scales per 128 columns; no scales per row; a ring of 32 lines, of which one is given twice."""
    monkeypatch.setitem(COUNTS, ("unstructured int4 g128", "sm_89"), ((400, 300), (0, 0), (0, 0)))
    time = sparse_time(card_of("4090"), UNSTRUCTURED_INT4[128], 4096, 4096, 8, 0.5)
    lines = (512 + 2.07 * 16) / 8 + 0.5625 + 1 + 3.5
    block = 32 * 4 + 4 * (16 + 128 * (1 + 16 * 2 + 8 + lines))
    assert time.memory == pytest.approx(
        (128 * block + 8 * 8192 * 2) / 1.008e12 / 0.85 * 1e6, rel=1e-4
    )
    cycle = 1e6 / 2.52e9 / 0.85
    assert time.cache == pytest.approx((block * 33 / 32 + 8 * 8192) / 15 * cycle, rel=1e-4)
    assert time.instructions == pytest.approx((64 * 400 + 4 * 300) / 4 * cycle)


@pytest.mark.parametrize("layout", [UNSTRUCTURED, UNSTRUCTURED_INT8, UNSTRUCTURED_INT4[64]])
def test_a_denser_layer_of_any_pattern_is_never_faster(layout):
    for card in CARDS:
        found = [
            sparse_time(card, layout, 8192, 4096, 8, tenths / 10).total for tenths in range(11)
        ]
        assert found == sorted(found)
        # elsewhere, instructions bound int4, as many for every density
        assert found[1] < found[9] or (
            layout is UNSTRUCTURED_INT4[64] and card.name not in ("4090", "l4")
        )


def test_a_dense_layer_by_hand():
    time = dense_time(card_of("a100"), 4096, 1024, 3, 0.5)
    assert time.total == pytest.approx(
        (4096 * 1024 / 2 + 3 * 5120 * 2) / 2.039e12 / 0.85 * 1e6 + 2.0
    )
    assert time.bound == "memory"
    assert DENSE == {"bf16": 2.0, "fp8": 1.0, "int4": 0.515625}


def test_a_large_batch_by_hand(monkeypatch):
    """[28672, 4096] times 128 tokens on an H100: 224 blocks of 128 rows for each 64 tokens, so at most 4 per multiprocessor. The
    weight comes from memory once. Each of four warps has 32 rows, and reads all of x from shared memory."""
    monkeypatch.setitem(COUNTS, ("int4 g128", "sm_90"), ((0, 0),) * 10 + ((900, 700),))
    time = sparse_time(card_of("h100"), INT4[128], 28672, 4096, 128)
    weights, x, out = 1792 * 32 * 800, 128 * 4096 * 2, 128 * 28672 * 2
    assert time.memory == pytest.approx((weights + x + out) / 3.35e12 / 0.85 * 1e6)
    cycle, per_block = 1e6 / 1.83e9 / 0.85, 8 * 32 * 800
    assert time.cache == pytest.approx(4 * (per_block + x / 2) / 35 * cycle)
    assert time.shared == pytest.approx(4 * (2 * per_block + 5 * x / 2) / 128 * cycle)
    assert time.instructions == pytest.approx(4 * 4 * (32 * 900 + 700) / 4 * cycle)
    assert time.tensor_cores == pytest.approx(4 * 128 * 4096 * 64 / 2 / 1024 * cycle)


def test_a_dense_layer_with_many_tokens_is_bound_by_its_products():
    card = card_of("4090")
    assert dense_time(card, 4096, 4096, 64, 2.0).bound == "memory"
    assert dense_time(card, 4096, 4096, 128, DENSE["int4"]).bound == "tensor cores"
    fp8 = dense_time(card, 4096, 4096, 128, DENSE["fp8"])
    assert fp8.tensor_cores == pytest.approx(2 * 4096 * 4096 * 128 / (2 * 165.2e12) / 0.85 * 1e6)


def test_a_prompt_by_hand():
    """[28672, 4096] times 2048 tokens on an H100: 14 parts of 2048 rows, 17 MB in bfloat16, which half of L2 holds; each has 256
    blocks of 128 rows and tokens, two waves of 132, as many in all as the whole weight."""
    packed, dense = prompt_times(card_of("h100"), INT4[128], 28672, 4096, 2048, 0.5)
    product = 2 * 28 * 132 * 128 * 128 * 4096 / 989e12 / 0.85 * 1e6
    read, written = 1792 * 32 * 800 / 3.35e12, 2 * 28672 * 4096 / (132 * 35 * 1.83e9)
    assert dense == pytest.approx(product + 2)
    assert packed == pytest.approx(max(read, written) / 0.85 * 1e6 + product + 14 * 2 * 2)
    any_pattern, _ = prompt_times(
        card_of("h100"), UNSTRUCTURED, 28672, 4096, 2048, 0.5
    )  # 4 parts, written to memory
    moved = UNSTRUCTURED.nbytes(28672, 4096, 0.5) + 2 * 28672 * 4096
    assert any_pattern == pytest.approx(moved / 3.35e12 / 0.85 * 1e6 + product + 4 * 2 * 2)
    short = prompt_times(card_of("h100"), INT4[128], 28672, 4096, 129, 0.5)[1]  # bound by memory
    assert short == pytest.approx(
        2 * (28672 * 4096 + 129 * (28672 + 4096)) / 3.35e12 / 0.85 * 1e6 + 2
    )


def test_a_prompt_by_cusparselt_by_hand():
    """[28672, 4096] times 2048 tokens on an H100: 28 waves of 132 blocks of 128 rows and tokens, at 1.5 times the dense rate."""
    product = 2 * 28 * 132 * 128 * 128 * 4096 / (1.5 * 989e12) / 0.85 * 1e6
    assert cusparselt_time(card_of("h100"), 28672, 4096, 2048) == pytest.approx(product + 2)
    few = cusparselt_time(
        card_of("h100"), 28672, 4096, 8
    )  # bound by memory: 9/16 of the bytes of bfloat16
    assert few == pytest.approx(
        (28672 * 4096 * 1.125 + 2 * 8 * (28672 + 4096)) / 3.35e12 / 0.85 * 1e6 + 2
    )


@given(cards, shapes, st.sampled_from([300, 2048, 8192]))
def test_cusparselt_takes_at_least_half_of_a_dense_product(card, shape, number):
    dense = prompt_times(card, BF16, *shape, number, 0.5)[1]
    assert dense / 2 <= cusparselt_time(card, *shape, number) <= dense


def test_a_layer_over_dense_bfloat16_in_words():
    gain, words = over_dense(card_of("h100"), INT4[128], 28672, 4096, 0.5)
    packed = sparse_time(card_of("h100"), INT4[128], 28672, 4096, 8).total
    dense = dense_time(card_of("h100"), 28672, 4096, 8, 2.0).total
    assert gain == dense / packed
    assert words.startswith(
        f"predicted on H100 SXM: {packed:.1f} us packed and {dense:.1f} us dense in bfloat16 for 8 tokens"
    )


def test_the_longest_resource_counts():
    assert Time(3.0, 1.0, 2.0, 5.0, 4.0).total == 7.0
    for n, name in enumerate(["memory", "L2", "shared memory", "instructions", "tensor cores"]):
        assert Time(*(float(n == each) for each in range(5))).bound == name


@given(cards, st.sampled_from(ALL), shapes, tokens)
def test_a_better_card_is_never_slower(card, layout, shape, number):
    better = [
        {"bandwidth": 2 * card.bandwidth},
        {"clock": 1.5 * card.clock},
        {"cache_port": 2 * card.cache_port},
    ]
    for change in better:
        assert (
            sparse_time(replace(card, **change), layout, *shape, number).total
            <= sparse_time(card, layout, *shape, number).total
        )
    faster = replace(card, bandwidth=2 * card.bandwidth, peak=2 * card.peak)
    assert (
        dense_time(faster, *shape, number, 2.0).total < dense_time(card, *shape, number, 2.0).total
    )


@given(cards, st.sampled_from(ALL), shapes, st.integers(1, 300), tokens)
def test_more_rows_or_columns_are_never_faster_on_the_same_program(
    card, layout, shape, more, number
):
    rows, columns = shape
    chosen = decode_program(layout, rows, columns, number, card.processors)

    def time(rows: int, columns: int) -> float:
        return time_of(card, layout, chosen, rows, columns, number, 0.5).total

    assert sparse_time(card, layout, rows, columns, number).total == time(rows, columns)
    assert time(rows + 16 * more, columns) >= time(rows, columns)
    assert time(rows, columns + 64 * more) >= time(rows, columns)


@given(cards, st.sampled_from(ALL), shapes, st.sampled_from([(1, 8), (9, 16), (17, 32)]))
def test_more_tokens_of_one_program_are_never_faster(card, layout, shape, few_and_many):
    chosen = decode_program(layout, *shape, few_and_many[0], card.processors)
    few, many = (
        time_of(card, layout, chosen, *shape, number, 0.5).total for number in few_and_many
    )
    assert few <= many


@pytest.mark.parametrize("number", [0, -1, 129, 2048])
def test_other_numbers_of_tokens_are_an_error(number):
    with pytest.raises(RacError, match=f"{number} tokens: times are predicted for 1 to 128"):
        check_tokens(number)
    with pytest.raises(RacError, match="1 to 128"):
        sparse_time(CARDS[0], BF16, 64, 64, number)
    with pytest.raises(RacError, match="1 to 128"):
        dense_time(CARDS[0], 64, 64, number, 2.0)
