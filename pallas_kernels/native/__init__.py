"""Kernels of CPUs, in C++: compiled for the processor at hand when first needed, and called by XLA as custom calls."""

from pallas_kernels.native.library import UnavailableError, call, has_panels, has_tiles, load

__all__ = ["UnavailableError", "call", "has_panels", "has_tiles", "load"]
