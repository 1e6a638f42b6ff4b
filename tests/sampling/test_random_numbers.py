"""Threefry against its authors' test vectors, and the numbers made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxserve.sampling.random_numbers import threefry, uniforms

KNOWN_ANSWERS = [  # of Random123: key, counter, result
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize(("key", "counter", "expected"), KNOWN_ANSWERS)
def test_threefry_gives_the_known_answers(key, counter, expected):
    key, counter, expected = (tuple(np.array([word], np.uint32) for word in pair) for pair in (key, counter, expected))
    for found, word in zip(jax.jit(threefry)(key, counter), expected, strict=True):
        np.testing.assert_array_equal(found, word)


def test_uniforms_are_uniform_below_one_and_uncorrelated():
    seeds = np.stack([np.arange(20_000), np.zeros(20_000)], axis=1).astype(np.uint32)
    first, second = (np.asarray(a) for a in jax.jit(uniforms)(seeds, np.zeros(20_000, np.int32), 0))
    for values in (first, second):
        assert values.min() >= 0
        assert values.max() < 1
        assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.03


def test_seed_position_and_attempt_each_change_the_numbers():
    def number(low: int, high: int, position: int, attempt: int) -> float:
        seed = jnp.array([[low, high]], jnp.uint32)
        return float(uniforms(seed, jnp.array([position]), attempt)[0][0])

    numbers = {number(*(int(i == changed) for i in range(4))) for changed in range(5)}
    assert len(numbers) == 5
