"""matmul in numpy, in float64."""

import numpy as np


def matmul_reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """float64 [tokens, out_features] of x [tokens, in_features] and weight [out_features, in_features]."""
    return np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
