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
    refused_by: tuple[str, ...] = ()  # implementations that raise NotImplementedError


CASES: tuple[Case, ...] = (
    Case(name="one_token", slots=(33,)),
    Case(name="one_token_in_bfloat16", slots=(33,), dtype="bfloat16"),
    Case(name="a_block_and_one", slots=tuple(range(32, 49))),
    Case(name="scattered_with_padding", slots=(95, 16, 40, 0, 0, 0)),
    Case(name="padding_alone", slots=(0, 0)),
    Case(name="bfloat16", slots=(95, 16, 40, 0, 0, 0), dtype="bfloat16"),
    Case(name="float16", slots=(95, 16, 40, 0, 0, 0), dtype="float16", refused_by=("mosaic_tpu",)),
    Case(name="head_dim_80", slots=(95, 32, 63, 0), num_blocks=4, block_size=32, head_dim=80, dtype="bfloat16"),
    Case(name="head_dim_96", slots=(191, 64, 0), num_blocks=3, block_size=64, head_dim=96, kv_heads=1),
    Case(name="head_dim_256", slots=(255, 128, 129, 0), num_blocks=2, block_size=128, head_dim=256, dtype="bfloat16"),
    Case(name="blocks_of_256", slots=(256, 511, 300, 0), num_blocks=2, block_size=256, kv_heads=1, head_dim=128),
)
