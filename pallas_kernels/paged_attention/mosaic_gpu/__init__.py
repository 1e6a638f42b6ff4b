"""Paged attention for NVIDIA GPUs from Hopper on (Pallas Mosaic GPU)."""

from pallas_kernels.paged_attention.mosaic_gpu.attention import (
    build_plan,
    check_supported,
    paged_attention,
    plan_shapes,
)

__all__ = ["build_plan", "check_supported", "paged_attention", "plan_shapes"]
