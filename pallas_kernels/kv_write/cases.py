"""Writes that every implementation of kv_write must get right."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Tokens written to `slots` of a pool of `num_blocks` blocks; slots of block 0 are padding."""

    name: str
    slots: tuple[int, ...]
    num_blocks: int = 6
    block_size: int = 16
    kv_heads: int = 3
    head_dim: int = 64
    dtype: str = "float32"


CASES: tuple[Case, ...] = (
    Case(name="one_token", slots=(33,)),
    Case(name="one_token_in_bfloat16", slots=(33,), dtype="bfloat16"),
    Case(name="a_block_and_one", slots=tuple(range(32, 49))),
    Case(name="scattered_with_padding", slots=(95, 16, 40, 0, 0, 0)),
    Case(name="padding_alone", slots=(0, 0)),
    Case(name="bfloat16", slots=(95, 16, 40, 0, 0, 0), dtype="bfloat16"),
    Case(name="float16", slots=(95, 16, 40, 0, 0, 0), dtype="float16"),
    Case(name="blocks_of_256", slots=(256, 511, 300, 0), num_blocks=2, block_size=256, kv_heads=1, head_dim=128),
)
