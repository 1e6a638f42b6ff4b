"""Attention of a ragged batch over a paged KV cache."""

from pallas_kernels.paged_attention.geometry import AttentionGeometry
from pallas_kernels.paged_attention.implementations import choose_implementation
from pallas_kernels.paged_attention.metadata import (
    AttentionMetadata,
    build_metadata,
    build_without_tables,
    metadata_shapes,
)
from pallas_kernels.paged_attention.op import paged_attention

__all__ = [
    "AttentionGeometry",
    "AttentionMetadata",
    "build_metadata",
    "build_without_tables",
    "choose_implementation",
    "metadata_shapes",
    "paged_attention",
]
