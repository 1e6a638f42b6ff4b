"""Matrix products of a step's tokens with a checkpoint's weights."""

from pallas_kernels.matmul.norm import rms_norm
from pallas_kernels.matmul.op import matmul
from pallas_kernels.matmul.panels import panel_rows, to_panels

__all__ = ["matmul", "rms_norm", "panel_rows", "to_panels"]
