"""`BlockPool`: which KV blocks are free, who shares the others, and which free ones still hold something of use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class IntegrityError(AssertionError):
    """The books do not balance: a defect of the engine, never of a request."""


class BlockPool:
    """Hands out block ids with reference counts. Owned by the scheduler; no block's content is known here.

    # block      0       | 1 .. num_blocks - 1
    #            padding | owned (references >= 1), or free:
    #                    |   blank: content worthless, taken first
    #                    |   kept:  a later request may share the content; least recently used taken first
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"need num_blocks >= 2 and block_size >= 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size  # token positions a block
        self.num_usable = num_blocks - 1  # block 0 is reserved for padding
        self.on_evict: Callable[[int], None] | None = None  # told of each kept block whose content is given up
        self._references = [0] * num_blocks
        self._is_kept = bytearray(num_blocks)
        self._blank = list(range(num_blocks - 1, 0, -1))  # a stack
        self._kept: OrderedDict[int, None] = OrderedDict()  # free kept blocks, least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out, kept ones included."""
        return len(self._blank) + len(self._kept)

    @property
    def usage(self) -> float:
        """Fraction of the usable blocks that are owned, 0 to 1."""
        return 1.0 - self.num_free / self.num_usable

    def references(self, block_id: int) -> int:
        """How many owners a block has."""
        return self._references[block_id]

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free: sharing them lowers `num_free` by as much."""
        references = self._references
        return sum(1 for block_id in block_ids if not references[block_id])

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, one reference each; the caller has looked at `num_free`."""
        if num_blocks > self.num_free:
            raise IntegrityError(f"{num_blocks} blocks wanted, {self.num_free} of {self.num_usable} are free")
        blank = self._blank
        block_ids: list[int] = []
        for _ in range(num_blocks):
            block_id = blank.pop() if blank else self._evict()
            self._references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def touch(self, block_ids: Iterable[int]) -> None:
        """Add an owner to blocks whose content is shared; free kept ones are taken out of the free list."""
        references = self._references
        for block_id in block_ids:
            if not references[block_id]:
                if not self._is_kept[block_id]:
                    raise IntegrityError(f"block {block_id} is free and blank: its content cannot be shared")
                del self._kept[block_id]
            references[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Take one owner off each block of a table. The table's tail is the first to be evicted."""
        references, is_kept = self._references, self._is_kept
        for block_id in reversed(block_ids):
            if references[block_id] <= 0:
                raise IntegrityError(f"block {block_id} is freed, but nobody owns it")
            references[block_id] -= 1
            if references[block_id]:
                continue
            if is_kept[block_id]:
                self._kept[block_id] = None
            else:
                self._blank.append(block_id)

    def keep(self, block_id: int) -> None:
        """An owned block's content is worth keeping once it is free."""
        if not self._references[block_id]:
            raise IntegrityError(f"block {block_id} is free: its content may be gone")
        self._is_kept[block_id] = 1

    def discard(self, block_id: int) -> None:
        """A block's content is of no use to anybody but its owners."""
        if self._is_kept[block_id]:
            self._is_kept[block_id] = 0
            if not self._references[block_id]:
                del self._kept[block_id]
                self._blank.append(block_id)

    def check_integrity(self, tables: Iterable[Iterable[int]] | None = None) -> None:
        """Raise `IntegrityError` unless free + owned = all and, given all block tables, references = owners."""
        free = [*self._blank, *self._kept]
        _check("blocks listed as free twice", sorted({b for b in free if free.count(b) > 1}) if _doubled(free) else [])
        free_set = set(free)
        usable = range(1, self.num_blocks)
        _check("free blocks with owners", [b for b in free if self._references[b]])
        _check(
            "lost blocks, neither free nor owned", [b for b in usable if not self._references[b] and b not in free_set]
        )
        _check("free blocks in the wrong list", [b for b in self._kept if not self._is_kept[b]])
        _check("free blocks in the wrong list", [b for b in self._blank if self._is_kept[b]])
        _check("padding block in use", [0] if self._references[0] or 0 in free_set else [])
        if tables is not None:
            owners = [0] * self.num_blocks
            for table in tables:
                for block_id in table:
                    owners[block_id] += 1
            wrong = [f"{b}: {self._references[b]} != {owners[b]}" for b in usable if self._references[b] != owners[b]]
            _check("reference counts that differ from the owners", wrong)

    def _evict(self) -> int:
        """The free kept block that was used longest ago, its content given up."""
        block_id, _ = self._kept.popitem(last=False)
        self._is_kept[block_id] = 0
        if self.on_evict is not None:
            self.on_evict(block_id)
        return block_id


def _doubled(block_ids: list[int]) -> bool:
    return len(set(block_ids)) != len(block_ids)


def _check(what: str, found: Sequence[object]) -> None:
    if found:
        shown = ", ".join(str(item) for item in found[:8])
        raise IntegrityError(f"block pool: {what}: {shown} ({len(found)} in all)")
