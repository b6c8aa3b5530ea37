from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.calibration.loader import SHARDS, CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence
from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings

PAD = 0
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


def sequences(lengths: list[int]) -> list[CalibrationSequence]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in lengths]
    return [CalibrationSequence(tuple(ids), len(ids) // 3, "traces") for ids in drawn]


def loader(chosen: list[CalibrationSequence], **changes) -> CalibrationLoader:
    options = CalibrationSettings(**{"batch_tokens": 64, **changes})
    return CalibrationLoader.of(chosen, options)


def content(batches: CalibrationLoader) -> list[tuple]:
    pairs = zip(batches, batches.token_weights, strict=True)
    return [(batch["input_ids"].tolist(), weights.tolist()) for batch, weights in pairs]


@given(lengths=LENGTHS, batch_tokens=st.integers(16, 200))
def test_every_sequence_is_there_once_padded_on_the_right_with_weight_zero(lengths, batch_tokens):
    chosen, ids_of_rows = sequences(lengths), []
    for rows, weights in content(loader(chosen, batch_tokens=batch_tokens)):
        longest = max(sum(w > 0 for w in weight) for weight in weights)
        assert {len(row) for row in (*rows, *weights)} == {longest}
        assert longest * len(rows) <= batch_tokens or len(rows) == 1
        for row, weight in zip(rows, weights, strict=True):
            real = sum(w > 0 for w in weight)
            assert weight == [1.0] * real + [0.0] * (longest - real)
            assert set(row[real:]) <= {PAD}
            ids_of_rows.append(tuple(row[:real]))
    assert sorted(ids_of_rows) == sorted(s.ids for s in chosen)


def test_a_batch_may_fill_its_limit_exactly_and_the_seed_decides_the_order():
    assert [b["input_ids"].shape for b in loader(sequences([32, 32]), batch_tokens=64)] == [(2, 32)]
    assert len(loader(sequences([32, 32]), batch_tokens=63)) == 2
    chosen = sequences(list(range(10, 50)))
    assert content(loader(chosen)) == content(loader(chosen)) != content(loader(chosen, seed=1))


@given(lengths=LENGTHS)
def test_unpadded_and_joined_have_the_same_tokens_in_order(lengths):
    chosen = sequences(lengths)
    alone = loader(chosen).unpadded()
    assert alone.shards_ended == [0] * len(chosen)
    assert [tuple(b["input_ids"][0].tolist()) for b in alone] == [s.ids for s in chosen]
    assert all(row.prompt_tokens == 0 for row in loader(chosen).joined().sequences)
    rows = [batch["input_ids"] for batch in loader(chosen).joined()]
    assert {tuple(row.shape) for row in rows} == {(1, max(lengths))}
    joined = torch.cat(rows, dim=1)[0].tolist()
    ids = [token for sequence in chosen for token in sequence.ids]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < max(lengths)


def test_rows_of_long_sequences_have_2048_tokens():
    rows = loader(sequences([3000, 5000, 200])).joined()
    assert [b["input_ids"].shape[1] for b in rows] == [2048] * 4


def test_the_hash_changes_with_tokens_and_order():
    chosen = sequences([9, 20, 31, 12])
    assert loader(chosen).sha256() == loader(list(chosen)).sha256()
    other_token = [replace(chosen[0], ids=(99, *chosen[0].ids[1:])), *chosen[1:]]
    others = [loader(other_token), loader(chosen, seed=3)]
    assert len({loader(chosen).sha256(), *(other.sha256() for other in others)}) == 3


def shards_of(share: CalibrationLoader) -> list[list[int]]:
    """The numbers of the batches in each shard of a share."""
    shards, shard = [], []
    for number, ended in zip(share.numbers, share.shards_ended, strict=True):
        shard.append(number)
        for _ in range(ended):
            shards.append(shard)
            shard = []
    assert not shard
    return shards


@settings(max_examples=25, deadline=None)
@given(batches=st.integers(1, 80), count=st.integers(1, 8))
def test_shards_are_the_same_with_any_number_of_processes(batches, count):
    whole = loader(sequences([40 + i % 3 for i in range(batches)]))
    alone = whole.share(0, 1)
    assert sum(alone.shards_ended) == min(SHARDS, batches)
    assert alone.numbers == list(range(batches))
    expected = shards_of(alone)
    assert max(map(len, expected)) - min(map(len, expected)) <= 1
    if count > batches:
        with pytest.raises(RacError, match=f"{count} processes share {batches} batches"):
            whole.share(0, count)
        return
    shares = [whole.share(rank, count) for rank in range(count)]
    in_turn = [shard for shards in zip(*map(shards_of, shares), strict=True) for shard in shards]
    padding = len(in_turn) - len(expected)
    assert in_turn == expected + [[]] * padding, "all end as many, the last ones without a batch"
    batches_alone = content(alone)
    for share in shares:
        assert content(share) == [batches_alone[number] for number in share.numbers]
    assert sorted(row for share in shares for row in content(share)) == sorted(content(whole))


def test_shards_have_like_sizes_the_largest_first():
    """Batches of 18 to 63 tokens make pairs of 81 tokens; one of 80 is alone, and the last."""
    lengths = [80, *range(18, 64)]
    whole = loader(sequences(lengths), batch_tokens=16)
    share = whole.share(0, 1)
    tokens = [weights.numel() for weights in share.token_weights]
    places = dict(zip(share.numbers, tokens, strict=True))
    sizes = [sum(places[number] for number in shard) for shard in shards_of(share)]
    assert sizes == [81] * 23 + [80]


def test_more_processes_than_shards_are_refused():
    whole = loader(sequences([40] * 60))
    whole.share(23, 24)
    with pytest.raises(RacError, match=r"25 processes share .*start at most 24"):
        whole.share(0, 25)
