"""What tokens are drawn from, computed plainly, and whether some were drawn from that."""

from __future__ import annotations

import numpy as np
from scipy import stats

from jaxserve.sampling_params import SamplingParams


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probabilities in float64, by sorting: temperature, min_p, top_k, then top_p of what is left."""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < params.min_p] = 0
    order = np.argsort(-weights, kind="stable")
    if params.top_k > 0:
        weights[order[params.top_k :]] = 0
    sums = np.cumsum(weights[order])
    weights[order[sums - weights[order] >= params.top_p * sums[-1]]] = 0
    return weights / weights.sum()


def assert_drawn_from(probabilities: np.ndarray, token_ids: np.ndarray) -> None:
    """Chi-square, tokens expected less than ten times pooled; never a token of probability 0."""
    counts = np.bincount(token_ids, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(token_ids)
    order = np.argsort(-expected)
    counts, expected = counts[order], expected[order]
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3
