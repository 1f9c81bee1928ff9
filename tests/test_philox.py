import math

import numpy as np
import pytest
import torch
from scipy import stats

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.philox import normal_reference, philox, timesteps, uniform_reference, words

IDS = torch.tensor([0, 7, 2**32 - 1, 12345])
KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 10: counter, key, result
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def from_hex(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter,key,expected", KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    ours = philox([torch.tensor(c) for c in from_hex(counter)], tuple(from_hex(key)))
    assert [int(word) for word in ours] == from_hex(expected)


def test_the_counter_is_element_sample_and_draw_and_the_key_is_the_seed():
    seed, draw = 0x299F31D0A4093822, 0x03707344
    quad = words(8, seed, torch.tensor([0x13198A2E]), draw)[0]
    counter = [torch.tensor(c) for c in (1, 0, 0x13198A2E, draw)]
    assert quad[4:].tolist() == [int(w) for w in philox(counter, (0xA4093822, 0x299F31D0))]
    counter[:2] = torch.tensor(0), torch.tensor(1 << 31)
    other = words(4, seed, torch.tensor([0x13198A2E]), torch.tensor(draw), stream=1)[0]
    assert other.tolist() == [int(w) for w in philox(counter, (0xA4093822, 0x299F31D0))]


def test_uniform_and_normal_follow_from_the_words():
    w = words(6, 3, IDS, 9).numpy()
    u, z = (op((4, 2, 3), 3, IDS, 9).flatten(1).numpy() for op in (uniform_reference, normal_reference))
    np.testing.assert_array_equal(u, (w[:, :6] >> 8) / 2.0**24)
    radius = np.sqrt(-2 * np.log(np.float32(w[:, ::2]) / 2**32 + np.float32(2**-33)))
    angle = 2 * np.pi * w[:, 1::2] / 2**32
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(4, 8)[:, :6]
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("draw_numbers", [ops.normal, ops.uniform])
def test_a_sample_has_its_numbers_in_any_batch(draw_numbers):
    whole = draw_numbers((4, 3, 5), 1, IDS, 2)
    assert torch.equal(whole[1:3], draw_numbers((2, 3, 5), 1, IDS[1:3], torch.tensor(2)))
    assert torch.equal(whole[:, :2].flatten(1), draw_numbers((4, 10), 1, IDS, torch.tensor([2])))
    for other in (draw_numbers((4, 3, 5), 2, IDS, 2), draw_numbers((4, 3, 5), 1, IDS, 3), whole.flip(0)):
        assert not (whole == other).any()
    assert draw_numbers((0, 3), 1, IDS[:0], 2).shape == (0, 3)
    assert draw_numbers((4, 0, 3), 1, IDS, 2).shape == (4, 0, 3)
    assert draw_numbers((4, 3), 1, IDS, 2, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_extreme_words_give_finite_normals():
    def normals_of(a, b):  # through the formula of the reference, at words no search would find
        u = torch.tensor(float(a)).mul(2.0**-32).add(2.0**-33).double()
        return float((-2 * u.log()).sqrt()) * math.cos(2 * math.pi * b / 2**32)

    assert normals_of(0, 0) == pytest.approx(6.7637, abs=1e-3)
    assert normals_of(2**32 - 1, 0) == 0


def test_moments_correlations_and_distribution():
    n = 1_000_000
    z = ops.normal((8, n // 8), 20, torch.arange(8), 4).double()
    flat = z.flatten()
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / n)  # E z^2p is (2p - 1)!!
        assert flat.pow(power).mean().item() == pytest.approx(expected, abs=5 * spread)
    correlation = torch.corrcoef(z) - torch.eye(8)  # between samples
    assert correlation.abs().max() < 5 / math.sqrt(n / 8)
    for lag in (1, 2, 3, 4, 8):  # within a quad and between quads
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / math.sqrt(n)
        assert abs((flat[lag:].square() * flat[:-lag].square()).mean() - 1) < 5 * math.sqrt(8 / n)
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-4
    u = ops.uniform((8, n // 8), 20, torch.arange(8), 4).flatten().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-4


def test_consecutive_keys_are_uncorrelated():
    ids, n = torch.arange(3), 60_000
    rows = [ops.normal((3, n), seed, ids, draw) for seed in (0, 1) for draw in (0, 1)]
    assert (torch.corrcoef(torch.cat(rows)) - torch.eye(12)).abs().max() < 5.5 / math.sqrt(n)


@pytest.mark.parametrize(
    "options,cdf",
    [
        ({}, lambda s: s),
        (
            {"kind": "logit-normal", "mean": 0.5, "std": 0.8},
            lambda s: stats.norm.cdf((np.log(s / (1 - s)) - 0.5) / 0.8),
        ),
        ({"kind": "power"}, lambda s: s**2),
        ({"kind": "power", "power": 2.0}, lambda s: s**0.5),
        ({"kind": "stratified"}, lambda s: s),
        ({"kind": "importance", "weights": torch.arange(700.0)}, lambda s: s**2),
    ],
    ids=["uniform", "logit-normal", "power 0.5", "power 2", "stratified", "importance"],
)
def test_timestep_distributions(options, cdf):
    n, T = 50_000, 700
    t = timesteps(T, 5, torch.arange(n), 1, **options)
    assert t.shape == (n,) and t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    for s in np.arange(1, 7) / 7:
        p = cdf(s)
        assert (t < s * T).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / n) + 2e-3)
    if options.get("kind") != "stratified":
        assert torch.equal(t[100:200], timesteps(T, 5, torch.arange(100, 200), torch.tensor(1), **options))


def test_stratified_timesteps_fall_one_into_each_stratum():
    t = timesteps(1000, 5, torch.arange(10) * 3, 1, kind="stratified")
    assert (t // 100).tolist() == list(range(10))
    assert timesteps(1000, 5, IDS[:0], kind="stratified").shape == (0,)


def test_timesteps_are_independent_of_the_noise():
    ids = torch.arange(40_000)
    u = timesteps(10_000, 5, ids, 1).double()
    z = ops.normal((len(ids), 1), 5, ids, 1)[:, 0].double()
    assert torch.corrcoef(torch.stack([u, z, z.square()]))[0, 1:].abs().max() < 5 / math.sqrt(len(ids))


def test_timesteps_of_weight_zero_are_never_drawn():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    assert set(timesteps(5, 5, torch.arange(1000), kind="importance", weights=weights).tolist()) == {1, 3}


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: ops.normal((3, 2), 0, IDS), r"sample_ids is torch.int64 \(4,\), must be int64 \(3,\)"),
        (lambda: ops.normal((4, 2), 0, IDS.int()), "sample_ids is torch.int32"),
        (lambda: ops.normal((4, 2), 0, IDS - 1), "sample_ids span -1 to"),
        (lambda: ops.normal((4, 2), 0, IDS + 1), "sample_ids span .* 2\\^32"),
        (lambda: ops.normal((4, 2), -1, IDS), "seed is -1"),
        (lambda: ops.uniform((4, 2), 2**64, IDS), "seed is 18446744073709551616"),
        (lambda: ops.uniform((4, 2), 0, IDS, -1), "draw is -1"),
        (lambda: ops.uniform((4, 2), 0, IDS, torch.tensor(2**32)), "draw is 4294967296"),
        (lambda: ops.uniform((4, 2), 0, IDS, torch.tensor([1, 2])), r"draw is torch.int64 \(2,\)"),
        (lambda: ops.uniform((4, 2), 0, IDS, torch.tensor(1.0)), "draw is torch.float32"),
        (lambda: timesteps(0, 0, IDS), "num_timesteps"),
        (lambda: timesteps(9, 0, IDS, kind="gamma"), "distribution is 'gamma'"),
        (lambda: timesteps(9, 0, IDS, kind="power", power=0.0), "power are 9, 1.0, 0.0"),
        (lambda: timesteps(9, 0, IDS, kind="importance"), r"weights is None, must be \(9,\)"),
        (lambda: timesteps(9, 0, IDS, kind="importance", weights=torch.ones(8)), r"weights is \(8,\)"),
        (lambda: timesteps(9, 0, IDS, kind="importance", weights=-torch.ones(9)), "none of them negative"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(InputError, match=says):
        call()
