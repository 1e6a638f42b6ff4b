"""Paged attention for NVIDIA Hopper GPUs (Pallas Mosaic GPU)."""

from pallas_kernels.paged_attention.mosaic_gpu.attention import (
    build_plan,
    check_supported,
    paged_attention,
    plan_shapes,
)

__all__ = ["build_plan", "check_supported", "paged_attention", "plan_shapes"]
