"""What the compile check reads off compiled programs, without a compiler: the examples in its docstrings."""

import doctest

import pytest

from jaxserve.plan import hlo
from tests.compile_check import catalogue, inspection, plans, report, targets


@pytest.mark.parametrize("module", [hlo, inspection, plans, report, targets], ids=lambda module: module.__name__)
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


# As XLA writes it (shortened): a kernel that writes to a pool in place, in one fusion with a slice of its operands.
AROUND_A_KERNEL = """
%dynamic-slice-fusion (p0: s32[{total}], p1: bf16[7,16,2,64]) -> (bf16[4,8], bf16[7,16,2,64]) {{
  %p0 = s32[{total}]{{0}} parameter(0)
  %slice.1 = s32[32]{{0}} slice(%p0), slice={{[{start}:{end}]}}, metadata={{op_name="jit(program)/slice"}}
  %p1 = bf16[7,16,2,64]{{3,2,1,0}} parameter(1)
  ROOT %call = (bf16[4,8]{{1,0}}, bf16[7,16,2,64]{{3,2,1,0}}) custom-call(%slice.1, %p1), custom_call_target="mosaic_gpu_v2"{aliasing}
}}

ENTRY %main (packed: s32[{total}], pool: bf16[7,16,2,64]) -> bf16[7,16,2,64] {{
  %packed = s32[{total}]{{0}} parameter(0)
  %elsewhere = s32[3]{{0}} slice(%packed), slice={{[1:4]}}
  %pool = bf16[7,16,2,64]{{3,2,1,0}} parameter(1)
  %fusion = (bf16[4,8]{{1,0}}, bf16[7,16,2,64]{{3,2,1,0}}) fusion(%packed, %pool), kind=kCustom, calls=%dynamic-slice-fusion
  ROOT %written = bf16[7,16,2,64]{{3,2,1,0}} get-tuple-element(%fusion), index=1
}}
"""  # noqa: E501
POOL_ELEMENTS = 7 * 16 * 2 * 64


def around_a_kernel(*, start: int = 64, aliasing: str = ", output_to_operand_aliasing={{1}: (1, {})}") -> str:
    return AROUND_A_KERNEL.format(total=256, start=start, end=start + 32, aliasing=aliasing)


def test_a_fusion_around_a_kernel_that_writes_in_place_makes_no_pool():
    assert inspection.pool_makers(around_a_kernel(), POOL_ELEMENTS) == []


def test_a_fusion_around_a_kernel_that_makes_a_pool_is_found():
    assert inspection.pool_makers(around_a_kernel(aliasing=""), POOL_ELEMENTS) == ["custom-call", "fusion"]


def test_a_fusion_with_more_pools_than_its_kernel_writes_is_found():
    hlo = around_a_kernel().replace(
        "bf16[4,8]{1,0}, bf16[7,16,2,64]{3,2,1,0}) fusion", "bf16[1792,8], bf16[14336]) fusion"
    )
    assert inspection.pool_makers(hlo, POOL_ELEMENTS) == ["fusion"]


def test_slices_that_kernels_get_at_odd_addresses_are_found():
    assert inspection.unaligned_operands(around_a_kernel(start=64)) == []  # 256 bytes
    assert inspection.unaligned_operands(around_a_kernel(start=48)) == ["slice.1"]


def test_what_drafts_is_compiled_when_asked_for():
    everything = {catalogue.key(job) for job in catalogue.all_jobs(full=False)}
    usual = {catalogue.key(job) for job in catalogue.all_jobs(full=False, drafts=False)}
    drafting = everything - usual
    assert usual < everything
    assert {name.split(",")[0] for name in drafting} == {"Llama 3.1 8B", "MiMo 7B"}
    assert all("head" in name or "draft model" in name for name in drafting)
