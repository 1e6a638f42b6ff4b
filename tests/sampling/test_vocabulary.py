"""The reductions over the vocabulary against NumPy, ties and odd sizes included."""

import jax
import numpy as np
import pytest

from jaxserve.sampling.vocabulary import Vocabulary
from tests.sampling.sample_batch import random_logits

SIZES = [1, 5, 127, 128, 129, 1000, 9000, 16384]


def with_ties(rows: int, vocab_size: int) -> np.ndarray:
    return np.round(random_logits(rows, vocab_size))


@pytest.mark.parametrize("vocab_size", SIZES)
def test_argmax_takes_the_lowest_id_of_the_best(vocab_size):
    logits = with_ties(4, vocab_size)
    found = jax.jit(lambda x: Vocabulary.of(x).argmax())(logits)
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("count", [1, 20, 64])
def test_top_is_a_stable_sort_s_beginning(vocab_size, count):
    logits = with_ties(3, vocab_size)
    values, token_ids = jax.jit(lambda x: Vocabulary.of(x).top(count))(logits)
    expected = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(token_ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, -1))


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.nan, np.inf], [-np.inf] * 300])
def test_rows_that_are_not_finite_are_known(bad):
    logits = random_logits(3, 300)
    logits[1, : len(bad)] = bad
    np.testing.assert_array_equal(Vocabulary.of(jax.numpy.asarray(logits)).is_finite, [True, False, True])
