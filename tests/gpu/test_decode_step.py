"""The step that the check times is the engine's own: it is told what the engine would tell it, and it runs."""

from concurrent.futures import Future
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.runner.batch import BatchBuilder
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.packing import Packing
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import NewSlot, StepPlan
from pallas_kernels.dispatch import Implementation
from tests.gpu.decode_step import CompiledStep, DecodeSteps
from tests.gpu.sizes import TOY

BATCH = 4
SIZES = replace(TOY, batches=(BATCH,))


def plan_of(steps: DecodeSteps) -> StepPlan:
    """Decodes at the end of the context, each in a slot of its own that it takes with this step."""
    context, slots = SIZES.context, range(1, BATCH + 1)
    new_slots = [
        NewSlot(
            slot=slot,
            request_id=str(slot),
            token_ids=[0] * context,
            num_prompt_tokens=context,
            sampling_params=SamplingParams(),
            stop_token_ids=[],
            block_ids=[1 + (slot - 1) * steps.blocks_per_seq + index for index in range(steps.blocks_per_seq)],
        )
        for slot in slots
    ]
    return StepPlan(
        step_id=0,
        new_slots=new_slots,
        request_ids=[new.request_id for new in new_slots],
        slots=list(slots),
        starts=[context - 1] * BATCH,
        num_tokens=[1] * BATCH,
        samples=[True] * BATCH,
    )


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_step_is_told_what_the_engine_would_tell_it(implementation: Implementation):
    steps = DecodeSteps(SIZES)
    steps.backend = replace(steps.backend, implementation=implementation)  # plans are made without a GPU
    plan = plan_of(steps)
    slots = SlotTable(max_num_seqs=BATCH, max_blocks_per_seq=steps.blocks_per_seq)
    slots.apply(plan)
    (batch,) = BatchBuilder(Buckets((BATCH,), (BATCH,)), slots, steps.backend).build(plan).batches
    wanted, sample = ForwardBatch.from_host(batch), SampleBatch.from_host(batch)

    packed, sample_packed, tables = steps._packed(BATCH)

    np.testing.assert_array_equal(packed, Packing(wanted).pack(wanted)[None])
    np.testing.assert_array_equal(tables, slots.block_tables)
    told = Packing(sample).unpack(jnp.asarray(sample_packed[0]))
    np.testing.assert_array_equal(told.slots, sample.slots)
    assert told.num_rows == sample.num_rows
    np.testing.assert_array_equal(told.positions, sample.positions - 1)  # the last anew: there is no next one


def test_a_step_runs_and_is_timed():
    steps = DecodeSteps(SIZES)
    compiled: Future[CompiledStep] = Future()
    compiled.set_result(steps.compile(BATCH))
    figures = steps.measure(BATCH, compiled)
    assert 0 < figures["min_ms"] <= figures["ms"]
    assert figures["tokens_per_s"] == pytest.approx(BATCH / figures["ms"] * 1e3)
    assert figures["read_bytes"] > BATCH * SIZES.context * steps.kv_spec.block_bytes / SIZES.block_size
