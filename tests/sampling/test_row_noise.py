import math

import torch

from rac_modifier.sampling.row_noise import gumbel_noise, row_keys

MASK = 2**64 - 1


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference(row, position, token):
    """The same noise with Python's unbounded integers."""
    bits = mix(
        mix(row + (position + 1) * 0x9E3779B1 & MASK) ^ mix((token + 1) * 0x9E3779B97F4A7C15 & MASK)
    ) & (2**63 - 1)
    return -math.log(-math.log1p(-(bits + 0.5) / 2**63))


def test_equals_the_reference_in_plain_integers():
    rows = row_keys(3, ["a#0", "b#1"])
    for position in (0, 1, 511, 100_000):
        noise = gumbel_noise(rows, position, torch.arange(40))
        expected = [
            [reference(row, position, token) for token in range(40)] for row in rows.tolist()
        ]
        torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_tokens_noise_does_not_depend_on_the_others():
    rows = row_keys(3, ["a#0", "b#1"])
    whole = gumbel_noise(rows, 7, torch.arange(50))
    ids = torch.tensor([[4, 49, 0], [17, 4, 30]])
    assert torch.equal(gumbel_noise(rows, 7, ids), whole.gather(1, ids))


def test_has_the_gumbel_distribution():
    noise = torch.cat(
        [gumbel_noise(row_keys(0, ["x", "y"]), p, torch.arange(1000)).flatten() for p in range(100)]
    )
    assert torch.isfinite(noise).all()
    assert abs(noise.mean().item() - 0.57722) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    # The whole curve: P(g <= x) = exp(-exp(-x)).
    for x in (-1.0, 0.0, 1.0, 3.0, 6.0):
        assert abs((noise <= x).float().mean().item() - math.exp(-math.exp(-x))) < 0.005


def test_rows_positions_seeds_and_keys_are_uncorrelated():
    rows = row_keys(0, ["a", "b"])
    base = gumbel_noise(rows, 5, torch.arange(20_000))
    others = [
        base[1],
        gumbel_noise(rows, 6, torch.arange(20_000))[0],
        gumbel_noise(row_keys(1, ["a"]), 5, torch.arange(20_000))[0],
    ]
    for other in [*others, base[0].roll(1)]:
        assert abs(torch.corrcoef(torch.stack([base[0], other]))[0, 1].item()) < 0.03


def test_arg_max_draws_from_the_softmax():
    scores = torch.log(torch.tensor([0.6, 0.25, 0.1, 0.05]))
    rows = row_keys(0, [str(i) for i in range(500)])
    draws = torch.cat(
        [(scores + gumbel_noise(rows, p, torch.arange(4))).argmax(-1) for p in range(80)]
    )
    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(frequencies, scores.exp(), atol=0.01, rtol=0)
