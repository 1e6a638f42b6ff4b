"""Paged attention for TPU (v5e, v6e) in Pallas. Compiled and interpreted, but never run on a TPU."""

from pallas_kernels.paged_attention.mosaic_tpu.attention import check_supported, paged_attention
from pallas_kernels.paged_attention.mosaic_tpu.layout import POOL_HEAD_AXIS, padded_head_dim, pool_shape
from pallas_kernels.paged_attention.mosaic_tpu.plan import build_plan, plan_shapes

__all__ = [
    "POOL_HEAD_AXIS",
    "build_plan",
    "check_supported",
    "padded_head_dim",
    "paged_attention",
    "plan_shapes",
    "pool_shape",
]
