"""From plans to padded arrays: positions, KV slots, order of rows, padding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.layers.attention import AttentionBackend
from jaxserve.parallel.mesh import make_mesh
from jaxserve.runner.batch import BatchBuilder, empty_batch
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.packing import Packing
from jaxserve.runner.slot_table import SlotTable
from jaxserve.runner.step import ForwardBatch, SampleBatch
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import NewSlot, StepPlan
from pallas_kernels.paged_attention import AttentionGeometry

BLOCK = 4
GEOMETRY = AttentionGeometry(q_heads=2, kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")
BACKEND = AttentionBackend(mesh=make_mesh(), implementation="xla", geometry=GEOMETRY)


def new_slot(slot: int, token_ids: list[int], block_ids: list[int], **params) -> NewSlot:
    return NewSlot(
        slot=slot,
        request_id=f"r{slot}",
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=SamplingParams(**params),
        stop_token_ids=[],
        block_ids=block_ids,
    )


@pytest.fixture
def slots() -> SlotTable:
    table = SlotTable(max_num_seqs=4, max_blocks_per_seq=4)
    plan = StepPlan(step_id=0)
    plan.new_slots = [new_slot(1, [1] * 6, [5, 2]), new_slot(3, [1] * 3, [7])]
    table.apply(plan)
    return table


@pytest.fixture
def builder(slots: SlotTable) -> BatchBuilder:
    return BatchBuilder(Buckets((4, 8), (2, 4)), slots, BACKEND)


def plan_of(*rows: tuple[int, int, int, bool]) -> StepPlan:
    """Rows of (slot, start, num_tokens, samples)."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return StepPlan(
        step_id=1,
        request_ids=[f"r{slot}" for slot in columns[0]],
        slots=columns[0],
        starts=columns[1],
        num_tokens=columns[2],
        samples=columns[3],
    )


def test_rows_of_one_token_come_first_and_the_order_is_kept(builder: BatchBuilder) -> None:
    batch = builder.build(plan_of((1, 0, 6, True), (3, 2, 1, True))).batches[0]
    assert batch.order.tolist() == [1, 0]
    assert batch.bucket == Bucket(8, 4)
    assert batch.token_slots.tolist() == [3, 1, 1, 1, 1, 1, 1, 0]
    assert batch.positions.tolist() == [2, 0, 1, 2, 3, 4, 5, 0]
    assert batch.samples.rows.tolist() == [1, 0]
    assert batch.samples.tokens.tolist() == [0, 6, 0, 0]


def test_kv_slots_follow_the_block_tables_and_padding_goes_to_block_0(builder: BatchBuilder) -> None:
    batch = builder.build(plan_of((1, 3, 3, True))).batches[0]
    assert batch.kv_slots.tolist() == [5 * BLOCK + 3, 2 * BLOCK, 2 * BLOCK + 1, 0]


def test_only_rows_that_sample_have_samples_and_padding_writes_to_slot_0(builder: BatchBuilder) -> None:
    samples = builder.build(plan_of((1, 0, 2, False), (3, 0, 3, True))).batches[0].samples
    assert samples.rows.tolist() == [1]
    assert samples.tokens.tolist() == [4, 0, 0, 0]
    assert samples.slots.tolist() == [3, 0, 0, 0]
    assert samples.positions.tolist() == [3, 0, 0, 0]


def test_each_draft_is_a_sample_and_so_is_the_token_before_it(builder: BatchBuilder) -> None:
    plan = plan_of((1, 3, 3, True), (3, 2, 1, True))
    plan.drafts = {0: [9, 9]}
    samples = builder.build(plan).batches[0].samples
    assert samples.rows.tolist() == [1, 0, 0, 0]
    assert samples.tokens.tolist() == [0, 1, 2, 3]
    assert samples.slots.tolist() == [3, 1, 1, 1]
    assert samples.positions.tolist() == [3, 4, 5, 6]


def test_appended_blocks_are_found(builder: BatchBuilder, slots: SlotTable) -> None:
    blocks = slots.apply(StepPlan(step_id=1, new_blocks=[(3, [9]), (1, []), (3, [4])]))
    assert blocks.tolist() == [[3, 3], [1, 2], [9, 4]]
    batch = builder.build(plan_of((3, 8, 1, True))).batches[0]
    assert batch.kv_slots[0] == 4 * BLOCK


def test_a_slot_taken_again_forgets_its_last_owner(builder: BatchBuilder, slots: SlotTable) -> None:
    slots.apply(StepPlan(step_id=1, new_slots=[new_slot(1, [1, 2], [8], logprobs=3, prompt_logprobs=2)]))
    assert slots.block_tables[1].tolist() == [8, 0, 0, 0]
    assert slots.num_logprobs == {1: 3}
    assert slots.prompt_logprobs[1].token_ids.tolist() == [1, 2]
    slots.apply(StepPlan(step_id=2, new_slots=[new_slot(1, [3], [6])]))
    assert slots.num_logprobs == {}
    assert slots.prompt_logprobs == {}


def test_every_batch_of_a_bucket_has_the_shapes_of_its_padding(builder: BatchBuilder) -> None:
    batch = builder.build(plan_of((1, 0, 5, True), (3, 2, 1, False))).batches[0]
    padding = empty_batch(batch.bucket, BACKEND, blocks_per_seq=4)
    packing = Packing(ForwardBatch.from_host(padding))
    packed = packing.pack(ForwardBatch.from_host(batch))
    unpacked = packing.unpack(jnp.asarray(packed))
    np.testing.assert_array_equal(unpacked.positions, batch.positions)
    np.testing.assert_array_equal(unpacked.metadata.kv_lens, batch.metadata.kv_lens)
    assert int(unpacked.num_tokens) == 6  # of 8
    assert int(SampleBatch.from_host(batch).num_rows) == 1  # of 4


def test_a_step_uploads_no_more_where_sequences_may_be_longer() -> None:
    def size(blocks_per_seq: int) -> int:
        padding = empty_batch(Bucket(8, 4), BACKEND, blocks_per_seq=blocks_per_seq)
        return Packing(ForwardBatch.from_host(padding)).size

    assert size(4096) == size(4)


def test_each_data_shard_has_a_batch_of_its_own_rows_in_one_bucket() -> None:
    slots = SlotTable(max_num_seqs=2, max_blocks_per_seq=4, num_data_shards=2)
    new = [new_slot(1, [1] * 3, [7]), new_slot(4, [1] * 6, [5, 2]), new_slot(5, [1], [3])]  # slot 3 is padding
    slots.apply(StepPlan(step_id=0, new_slots=new))
    step = BatchBuilder(Buckets((4, 8), (2, 4)), slots, BACKEND).build(
        plan_of((4, 0, 6, True), (1, 2, 1, True), (5, 0, 1, True))
    )
    first, second = step.batches
    assert first.bucket == second.bucket == Bucket(8, 4)
    assert (first.row_slots.tolist(), second.row_slots.tolist()) == ([1], [2, 1])
    assert first.kv_slots.tolist() == [7 * BLOCK + 2] + [0] * 7
    assert second.kv_slots[:4].tolist() == [3 * BLOCK, 5 * BLOCK, 5 * BLOCK + 1, 5 * BLOCK + 2]
    assert (step.sample_rows.tolist(), step.places.tolist()) == ([1, 2, 0], [0, 4, 5])


def test_drafts_of_a_data_shard_are_samples_of_its_own() -> None:
    slots = SlotTable(max_num_seqs=2, max_blocks_per_seq=4, num_data_shards=2)
    slots.apply(StepPlan(step_id=0, new_slots=[new_slot(1, [1] * 3, [7]), new_slot(5, [1] * 2, [3])]))
    plan = plan_of((5, 1, 3, True), (1, 2, 1, True))
    plan.drafts = {0: [9, 9]}
    step = BatchBuilder(Buckets((4,), (4,)), slots, BACKEND).build(plan)
    assert step.batches[1].samples.slots.tolist() == [2, 2, 2, 0]
    assert (step.sample_rows.tolist(), step.places.tolist()) == ([1, 0, 0, 0], [0, 4, 5, 6])
    slots_of, positions = step.samples_of(plan)
    assert slots_of.tolist() == [1, 0, 0, 0, 5, 5, 5, 0]
    assert positions.tolist() == [3, 0, 0, 0, 2, 3, 4, 0]


def test_a_data_shard_without_rows_has_padding_alone() -> None:
    slots = SlotTable(max_num_seqs=2, max_blocks_per_seq=4, num_data_shards=2)
    slots.apply(StepPlan(step_id=0, new_slots=[new_slot(4, [1] * 3, [7])]))
    idle, busy = BatchBuilder(Buckets((4,), (2,)), slots, BACKEND).build(plan_of((4, 0, 3, True))).batches
    assert (idle.num_rows, busy.num_rows) == (0, 1)
    padding = empty_batch(idle.bucket, BACKEND, blocks_per_seq=4)
    packing = Packing(ForwardBatch.from_host(padding))
    given, wanted = (packing.pack(ForwardBatch.from_host(batch)) for batch in (idle, padding))
    np.testing.assert_array_equal(given, wanted)


def test_a_step_beyond_the_largest_bucket_is_refused(builder: BatchBuilder) -> None:
    with pytest.raises(ValueError, match="largest bucket"):
        builder.build(plan_of((1, 0, 9, True)))


def test_packing_refuses_other_shapes() -> None:
    packing = Packing({"a": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="packing wants"):
        packing.pack({"a": np.zeros(4, np.int32)})


def test_packed_arrays_start_where_kernels_expect_their_arguments() -> None:
    packing = Packing({"a": np.zeros(3, np.int32), "b": np.zeros((2, 40), np.int32), "c": np.zeros(1, np.int32)})
    packed = packing.pack({"a": np.full(3, 1), "b": np.full((2, 40), 2), "c": np.full(1, 3)})
    starts = [int(np.argmax(packed == value)) for value in (1, 2, 3)]
    assert all(start * packed.itemsize % 256 == 0 for start in starts)
    assert starts[0] < starts[1] < starts[2]
