"""Compiles kernels and whole steps for devices that this machine does not have: `python -m tests.compile_check`."""
