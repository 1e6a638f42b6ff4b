"""What only a GPU can show of the kernels and the engine: `python -m tests.gpu.check`, and its parts."""
