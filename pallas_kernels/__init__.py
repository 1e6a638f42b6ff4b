"""Kernels of the serving engine: one folder an op, each with a contract, a readable reference and one file a device."""
