"""From a plan's ragged rows to the padded arrays of one bucket. NumPy only: it runs while the device works."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.layers.attention import AttentionBackend
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.slot_table import SlotTable
from jaxserve.scheduler.plan import StepPlan
from pallas_kernels.paged_attention import AttentionMetadata, build_without_tables


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One step's arrays of one data shard. Rows of one token come first; `order[i]` is batch row i's row in the plan.

    Slots count within the shard, as its arrays on the device do.
    """

    bucket: Bucket
    num_rows: int
    order: np.ndarray  # i64[num_rows]
    token_slots: np.ndarray  # i32[tokens], 0 past the end
    positions: np.ndarray  # i32[tokens]
    kv_slots: np.ndarray  # i32[tokens], in block 0 past the end
    metadata: AttentionMetadata  # NumPy leaves; without block tables, which the device has
    row_slots: np.ndarray  # i32[num_rows], the row's slot
    starts: np.ndarray  # i32[num_rows]
    num_tokens: np.ndarray  # i32[num_rows]
    samples: Samples


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokens of a step that yield a new one: those at the end of their row, one or, behind drafts, several."""

    rows: np.ndarray  # i64[num_samples], row in the plan
    tokens: np.ndarray  # i32[rows], index of the token in the batch; 0 past num_samples, as the next two
    slots: np.ndarray  # i32[rows], the row's slot
    positions: np.ndarray  # i32[rows], where the new token goes in its slot: how many tokens stand before it

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class HostStep:
    """One step: a batch for each data shard, all of one bucket, and how their samples lie in the arrays of all shards.

    # plan's rows        a b c d                             sample_rows  0 2 2 | 1 3
    # samples of shards  a c c . | b d . .                   places       0 1 2 | 4 5
    #                    (c has a draft, . is padding)
    """

    batches: list[HostBatch]
    sample_rows: np.ndarray  # i64[samples], shard by shard: the sample's row in the plan; those of a row in order
    places: np.ndarray  # i64[samples]: its place among the padded samples of all shards

    @classmethod
    def of(cls, batches: list[HostBatch]) -> HostStep:
        """The step of these batches, in the order of the shards."""
        num_rows = batches[0].bucket.num_rows
        places = [shard * num_rows + np.arange(len(batch.samples)) for shard, batch in enumerate(batches)]
        return cls(batches, np.concatenate([batch.samples.rows for batch in batches]), np.concatenate(places))

    @property
    def bucket(self) -> Bucket:
        """The shape all batches are padded to."""
        return self.batches[0].bucket

    def samples_of(self, plan: StepPlan) -> tuple[np.ndarray, np.ndarray]:
        """Of each place the slot, counted over all shards, and its position: i32[shards x rows] both, 0 for padding."""
        slots = np.zeros(len(self.batches) * self.bucket.num_rows, np.int32)
        slots[self.places] = np.array(plan.slots, np.int32)[self.sample_rows]
        return slots, np.concatenate([batch.samples.positions for batch in self.batches])


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a plan as arrays, those of one token first."""

    order: np.ndarray  # i64[rows], row in the plan
    slots: np.ndarray  # i32[rows]
    starts: np.ndarray  # i32[rows]
    num_tokens: np.ndarray  # i32[rows]
    num_samples: np.ndarray  # i32[rows], 0 where the row does not sample

    @classmethod
    def of(cls, plan: StepPlan) -> _Rows:
        columns = np.array([plan.slots, plan.starts, plan.num_tokens, plan.samples], np.int32)
        for row, draft_ids in plan.drafts.items():
            columns[3, row] += len(draft_ids)
        order = np.argsort(columns[2] > 1, kind="stable")
        return cls(order, *columns[:, order])

    def take(self, which: np.ndarray) -> _Rows:
        """Those where `which`, bool[rows], says so."""
        return _Rows(*(getattr(self, name)[which] for name in self.__slots__))


class BatchBuilder:
    """Builds each step's batches from its plan and the slot table."""

    def __init__(self, buckets: Buckets, slots: SlotTable, backend: AttentionBackend) -> None:
        self._buckets = buckets
        self._slots = slots
        self._backend = backend
        self._block_size = backend.geometry.block_size

    def build(self, plan: StepPlan) -> HostStep:
        """Pad the rows of each data shard to the smallest bucket; `slots.apply(plan)` must have been called."""
        rows = _Rows.of(plan)
        shard = rows.slots // self._slots.slots_per_shard
        shards = [rows.take(shard == index) for index in range(self._slots.num_data_shards)]
        bucket = self._buckets.pick(max(int(own.num_tokens.sum()) for own in shards))
        return HostStep.of([self._build(own, bucket, index) for index, own in enumerate(shards)])

    def _build(self, rows: _Rows, bucket: Bucket, shard: int) -> HostBatch:
        """The batch of one data shard's rows."""
        first_slot = shard * self._slots.slots_per_shard
        block_tables = self._slots.block_tables[first_slot : first_slot + self._slots.slots_per_shard]
        starts, num_tokens, row_slots = rows.starts, rows.num_tokens, rows.slots - first_slot
        ends = np.cumsum(num_tokens, dtype=np.int32)
        token_slots, positions = self._tokens(bucket, row_slots, starts, num_tokens, ends)
        blocks = block_tables[token_slots, positions // self._block_size]
        kv_lens = starts + num_tokens
        num_columns = -(-int(kv_lens.max(initial=0)) // self._block_size)
        return HostBatch(
            bucket=bucket,
            num_rows=len(starts),
            order=rows.order,
            token_slots=token_slots,
            positions=positions,
            kv_slots=blocks * self._block_size + positions % self._block_size,
            metadata=build_without_tables(
                num_tokens,
                kv_lens,
                block_tables[:, :num_columns][row_slots],
                geometry=self._backend.geometry,
                implementation=self._backend.implementation,
                num_tokens=bucket.num_tokens,
                num_rows=bucket.num_rows,
                blocks_per_seq=block_tables.shape[1],
            ),
            row_slots=row_slots,
            starts=starts,
            num_tokens=num_tokens,
            samples=_samples(rows, row_slots, ends, bucket.num_rows),
        )

    @staticmethod
    def _tokens(
        bucket: Bucket, row_slots: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each token's slot and position; padding is (0, 0).

        # rows        | a: start 7, 1 token | b: start 0, 3 tokens | padding
        # token_slots | a                   | b b b                | 0
        # positions   | 7                   | 0 1 2                | 0
        """
        total = int(num_tokens.sum())
        offsets = starts - (ends - num_tokens)  # position of a row's token minus its index in the batch
        token_slots = np.zeros(bucket.num_tokens, np.int32)
        positions = np.zeros(bucket.num_tokens, np.int32)
        token_slots[:total] = np.repeat(row_slots, num_tokens)
        positions[:total] = np.arange(total, dtype=np.int32) + np.repeat(offsets, num_tokens)
        return token_slots, positions


def _samples(rows: _Rows, row_slots: np.ndarray, ends: np.ndarray, num_rows: int) -> Samples:
    """Of each row that samples the last token, and the one before for each draft.

    # row                | a: 1 token | b: 4 tokens, the last 2 of them drafts | c: 2 tokens, does not sample
    # samples' tokens    | 0          | 2 3 4                                  |
    """
    counts = rows.num_samples
    owners = np.repeat(np.arange(len(counts)), counts)
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(owners))  # 1 for a row's last token
    return Samples(
        rows=rows.order[owners],
        tokens=padded(ends[owners] - from_end, num_rows),
        slots=padded(row_slots[owners], num_rows),
        positions=padded((rows.starts + rows.num_tokens)[owners] - from_end + 1, num_rows),
    )


def draft_places(plan: StepPlan) -> np.ndarray:
    """Where a plan's drafts belong in the token table: i32[3, drafts], slot, position and token id of each."""
    return np.array(
        [
            (plan.slots[row], plan.starts[row] + plan.num_tokens[row] - len(draft_ids) + index, token_id)
            for row, draft_ids in plan.drafts.items()
            for index, token_id in enumerate(draft_ids)
        ],
        np.int32,
    ).T


def padded(values: np.ndarray | list[int], size: int) -> np.ndarray:
    """i32[size]: `values`, then zeros."""
    padded = np.zeros(size, np.int32)
    padded[: len(values)] = values
    return padded


def empty_batch(bucket: Bucket, backend: AttentionBackend, *, blocks_per_seq: int) -> HostBatch:
    """A batch of padding alone: its shapes are those of every batch of the bucket."""
    nothing = np.zeros(0, np.int32)
    tokens, rows = (np.zeros(size, np.int32) for size in (bucket.num_tokens, bucket.num_rows))
    return HostBatch(
        bucket=bucket,
        num_rows=0,
        order=nothing,
        token_slots=tokens,
        positions=tokens,
        kv_slots=tokens,
        metadata=build_without_tables(
            nothing,
            nothing,
            np.zeros((0, 0), np.int32),
            geometry=backend.geometry,
            implementation=backend.implementation,
            num_tokens=bucket.num_tokens,
            num_rows=bucket.num_rows,
            blocks_per_seq=blocks_per_seq,
        ),
        row_slots=nothing,
        starts=nothing,
        num_tokens=nothing,
        samples=Samples(rows=nothing, tokens=rows, slots=rows, positions=rows),
    )
