"""Products that every implementation of matmul must get right."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sizes of one product."""

    name: str
    tokens: int
    in_features: int
    out_features: int
    dtype: str = "float32"  # of the weight


CASES: tuple[Case, ...] = tuple(
    Case(name=f"{name}_{dtype}", tokens=tokens, in_features=depth, out_features=width, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for name, tokens, depth, width in (
        ("one_token", 1, 64, 48),
        ("two_tokens", 2, 576, 960),
        ("a_row_short_of_a_tile", 5, 64, 16),
        ("a_row_more_than_a_tile", 7, 64, 20),
        ("odd_width", 3, 64, 19),
        ("odd_depth", 3, 83, 32),
        ("shallower_than_a_vector", 4, 7, 9),
        ("one_column", 6, 96, 1),
        ("deep", 13, 3072, 64),  # rows of x beyond the fast caches, several items
        ("most_tokens_of_a_small_step", 64, 200, 130),
        ("a_prompt", 130, 96, 72),
    )
)
