"""Writes the new tokens' keys and values into the paged pools."""

from pallas_kernels.kv_write.op import kv_write, rotate_and_write

__all__ = ["kv_write", "rotate_and_write"]
