"""Kernels of CPUs, in C++: compiled for the processor at hand when first needed, and called by XLA as custom calls."""

from pallas_kernels.native.library import UnavailableError, call, has_tiles, load, panel_columns

__all__ = ["UnavailableError", "call", "has_tiles", "load", "panel_columns"]
