"""Paged attention in plain XLA: runs everywhere, shaped for XLA:CPU."""

from pallas_kernels.paged_attention.xla.kernel import paged_attention
from pallas_kernels.paged_attention.xla.plan import build_plan, check_supported, plan_shapes

__all__ = ["build_plan", "check_supported", "paged_attention", "plan_shapes"]
