from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.calibration.loader import SHARDS, CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.errors import RacError
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.settings.calibration import CalibrationSettings
from tests.tiny import linears, tiny_model

PAD = 0


def sequences(lengths: list[int], seed: int = 0) -> list[CalibrationSequence]:
    generator = torch.Generator().manual_seed(seed)
    return [
        CalibrationSequence(
            tuple(torch.randint(2, 300, (n,), generator=generator).tolist()), n // 3, "traces"
        )
        for n in lengths
    ]


def loader(given_sequences: list[CalibrationSequence], **changes) -> CalibrationLoader:
    options = CalibrationSettings(**{"batch_tokens": 64, **changes})
    return CalibrationLoader(given_sequences, compose(given_sequences), options, PAD)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(lengths=LENGTHS, batch_tokens=st.integers(16, 200))
def test_every_sequence_is_there_once_padded_on_the_right_with_weight_zero(lengths, batch_tokens):
    wanted = sequences(lengths)
    made = loader(wanted, batch_tokens=batch_tokens, prompt_weight=0.5)
    found = []
    assert len(made.token_weights) == len(made)
    for batch, weights in zip(made, made.token_weights, strict=True):
        ids = batch["input_ids"]
        assert set(batch) == {"input_ids"}
        assert ids.dtype == torch.int64
        assert ids.shape == weights.shape
        assert ids.numel() <= batch_tokens or ids.shape[0] == 1
        for row, weight in zip(ids, weights, strict=True):
            real = int((weight > 0).sum())
            assert bool((weight[:real] > 0).all())
            assert bool((row[real:] == PAD).all())
            assert weight[: real // 3].eq(0.5).all()
            assert weight[real // 3 : real].eq(1.0).all()
            found.append(tuple(row[:real].tolist()))
        assert int((weights > 0).sum(dim=1).max()) == ids.shape[1]
    assert sorted(found) == sorted(s.ids for s in wanted)


def test_batches_come_in_the_order_of_the_seed_and_twice_the_same():
    wanted = sequences(list(range(10, 50)))
    first = [b["input_ids"].shape[1] for b in loader(wanted)]
    assert first == [b["input_ids"].shape[1] for b in loader(wanted)]
    assert first != [b["input_ids"].shape[1] for b in loader(wanted, seed=1)]
    made = loader(wanted)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, made, strict=True))


def test_unpadded_is_one_sequence_per_batch_in_the_same_order():
    wanted = sequences([30, 5, 50, 17])
    alone = loader(wanted).unpadded()
    assert [tuple(b["input_ids"][0].tolist()) for b in alone] == [s.ids for s in wanted]
    assert all(bool((w > 0).all()) for w in alone.token_weights)


@given(lengths=LENGTHS)
def test_joined_is_rows_of_equal_length_and_the_same_tokens_in_order(lengths):
    wanted = sequences(lengths)
    rows = [batch["input_ids"] for batch in loader(wanted).joined()]
    assert {tuple(row.shape) for row in rows} == {(1, max(lengths))}
    found = torch.cat(rows, dim=1)[0].tolist()
    given_ids = [token for sequence in wanted for token in sequence.ids]
    assert found == given_ids[: len(found)]
    assert len(given_ids) - len(found) < max(lengths)


def test_rows_of_long_sequences_have_2048_tokens():
    rows = loader(sequences([3000, 5000, 200])).joined()
    assert [b["input_ids"].shape[1] for b in rows] == [2048] * 4
    assert all(bool((w == 1).all()) for w in rows.token_weights)


def hessians(model, batches, weights) -> dict[str, torch.Tensor]:
    """Reference: full X^T X of each linear layer over all tokens of weight 1, from plain hooks."""
    sums = {
        name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64)
        for name, m in linears(model).items()
    }
    tokens = 0
    for batch, weight in zip(batches, weights, strict=True):
        keep = weight.flatten() > 0
        tokens += int(keep.sum())
        handles = []
        for name, module in linears(model).items():

            def hook(_module, args, name=name, keep=keep):
                x = args[0].reshape(-1, args[0].shape[-1])[keep].double()
                sums[name] += x.T @ x

            handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            model(input_ids=batch["input_ids"])
        for handle in handles:
            handle.remove()
    return {name: 2 * value / tokens for name, value in sums.items()}


@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=12))
def test_a_real_models_hessian_does_not_see_the_padding(lengths):
    model = tiny_model()
    made = loader(sequences(lengths), batch_tokens=256)
    padded = hessians(model, made, made.token_weights)
    alone = made.unpadded()
    for name, expected in hessians(model, alone, alone.token_weights).items():
        assert torch.isfinite(padded[name]).all()
        torch.testing.assert_close(padded[name], expected, rtol=1e-4, atol=1e-5)


def test_weights_of_prompt_thinking_answer_and_trace_reach_a_real_models_hessian():
    """Against a reference that sums weighted outer products token by token."""
    model = tiny_model()
    wanted = [
        replace(s, answer_start=s.prompt_tokens + 4, weight=w)
        for s, w in zip(sequences([20, 9, 33]), (1, 0.5, 3), strict=True)
    ]
    made = loader(wanted, batch_tokens=128, prompt_weight=0.25, answer_weight=5.0)
    name, module = next((n, m) for n, m in linears(model).items() if "down_proj" in n)
    hessian, total, sums = (
        Hessian(module.in_features),
        0.0,
        torch.zeros(module.in_features, module.in_features).double(),
    )

    def seen(ids: torch.Tensor) -> torch.Tensor:
        inputs = []
        handle = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        return inputs[0]

    for batch, weights in zip(made, made.token_weights, strict=True):
        hessian.add(seen(batch["input_ids"]), weights)
    for sequence, weight in zip(wanted, (1, 0.5, 3), strict=True):
        for position, x in enumerate(seen(torch.tensor([sequence.ids]))[0].double()):
            part = (
                0.25
                if position < sequence.prompt_tokens
                else 1.0
                if position < sequence.prompt_tokens + 4
                else 5.0
            )
            total += part * weight
            sums += part * weight * torch.outer(x, x)
    torch.testing.assert_close(
        hessian.matrix(name).double(), 2 * sums / total, rtol=1e-4, atol=1e-5
    )
    unweighted = Hessian(module.in_features)
    for batch, weights in zip(made, made.token_weights, strict=True):
        unweighted.add(seen(batch["input_ids"]), (weights > 0).float())
    assert not torch.allclose(unweighted.matrix(), hessian.matrix(), rtol=0.05)


def test_a_batch_may_fill_its_limit_exactly():
    assert [b["input_ids"].shape for b in loader(sequences([32, 32]), batch_tokens=64)] == [(2, 32)]
    assert len(loader(sequences([32, 32]), batch_tokens=63)) == 2


def test_the_hash_changes_with_tokens_weights_and_order():
    wanted = sequences([9, 20, 31, 12])
    same = {loader(wanted).sha256(), loader(list(wanted)).sha256()}
    assert len(same) == 1
    other_token = [replace(wanted[0], ids=(99, *wanted[0].ids[1:])), *wanted[1:]]
    others = {
        loader(other_token).sha256(),
        loader(wanted, prompt_weight=0.5).sha256(),
        loader(wanted, seed=3).sha256(),
    }
    assert len(others | same) == 4


@settings(max_examples=25)
@given(lengths=LENGTHS, count=st.integers(1, 5))
def test_the_shares_of_processes_are_all_batches_once(lengths, count):
    made = loader(sequences(lengths))
    if len(made) < count:
        with pytest.raises(
            RacError,
            match=f"{count} processes share {len(made)} batches.*lower calibration.batch_tokens",
        ):
            made.share(0, count)
        return
    shares = [made.share(rank, count) for rank in range(count)]

    def content(part: CalibrationLoader) -> list[tuple]:
        pairs = zip(part, part.token_weights, strict=True)
        return [(batch["input_ids"].tolist(), weights.tolist()) for batch, weights in pairs]

    assert sorted(row for share in shares for row in content(share)) == sorted(content(made))
    sizes = [sum(weights.numel() for weights in share.token_weights) for share in shares]
    largest = max(weights.numel() for weights in made.token_weights)
    if (
        len(made) <= SHARDS
    ):  # else shards are of several batches, and some may have one more than others in each round
        assert max(sizes) - min(sizes) <= largest * 2
    assert all(content(a) == content(made.share(rank, count)) for rank, a in enumerate(shares))
    for share in shares:
        assert len(share.unpadded()) == len(share.sequences)


@settings(max_examples=25, deadline=None)
@given(batches=st.integers(1, 80), count=st.integers(1, 8))
def test_shards_are_the_same_with_any_number_of_processes(batches, count):
    made = loader(sequences([40 + i % 3 for i in range(batches)]))
    assert len(made) == batches
    alone = made.share(0, 1)
    assert sum(alone.shards_ended) == min(SHARDS, batches)
    assert alone.numbers == list(range(batches))
    expected = shards_of(alone, 1)
    assert max(map(len, expected)) - min(map(len, expected)) <= 1
    if count > batches:
        return
    shares = [made.share(rank, count) for rank in range(count)]
    by_rank = [shards_of(share, count) for share in shares]
    assert len({len(shards) for shards in by_rank}) == 1, "all end as many"
    found = [shard for shards in zip(*by_rank, strict=True) for shard in shards]
    assert [shard for shard in found if shard] == expected
    assert found[len(expected) :] == [[]] * (len(found) - len(expected)), (
        "those without a batch are the last ones"
    )
    for share in shares:
        for number, batch in zip(share.numbers, share, strict=True):
            assert torch.equal(batch["input_ids"], list(alone)[number]["input_ids"])


def shards_of(share: CalibrationLoader, count: int) -> list[list[int]]:
    """The numbers of the batches in each shard of a share."""
    shards, shard = [], []
    for number, ended in zip(share.numbers, share.shards_ended, strict=True):
        shard.append(number)
        for _ in range(ended):
            shards.append(shard)
            shard = []
    assert not shard
    return shards


def test_more_processes_than_shards_are_refused():
    made = loader(sequences([40] * 60))
    made.share(23, 24)
    with pytest.raises(RacError, match="25 processes: at most 24 share a calibration set"):
        made.share(0, 25)
