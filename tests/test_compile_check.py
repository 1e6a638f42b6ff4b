"""What the compile check reads off compiled programs, without a compiler: the examples in its docstrings."""

import doctest

import pytest

from jaxserve.plan import hlo
from tests.compile_check import inspection, report


@pytest.mark.parametrize("module", [hlo, inspection, report], ids=lambda module: module.__name__)
def test_the_examples_hold(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_a_report_of_ptxas_is_read(tmp_path):
    said = "0 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads\nptxas info : Used 168 registers, used 2"
    (tmp_path / "decode_0.ptxas").write_text(said)
    (tmp_path / "decode_0.mlir-passes.log").write_text("gpu.launch dynamic_shared_memory_size %c16392_i32 {")
    (kernel,) = inspection.kernel_reports(tmp_path)
    assert (kernel.name, kernel.registers, kernel.spill_bytes, kernel.shared_bytes) == ("decode_0", 168, 24, 16392)


def test_products_that_ptxas_had_to_serialize_are_noticed(tmp_path):
    said = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions"
    (tmp_path / "prefill_0.ptxas").write_text(said)
    (kernel,) = inspection.kernel_reports(tmp_path)
    assert kernel.warnings
