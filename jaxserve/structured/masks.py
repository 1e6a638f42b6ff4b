"""`MaskMaker`: which tokens may come next, as packed bits, for every place of a step's sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLExecutor

from jaxserve.structured.matcher import GrammarMatcher
from jaxserve.structured.token_table import TokenTable

_BITS = 32
_ALL = np.uint32(0xFFFFFFFF)


class MaskMaker:
    """Makes the masks of all sequences side by side, in threads that hold no lock of the interpreter's."""

    def __init__(self, table: TokenTable, *, num_threads: int | None = None) -> None:
        """`num_threads`: llguidance's default is 80 % of the cores, up to 32."""
        self._executor = LLExecutor(num_threads)
        self._num_words = -(-len(table.tokens) // _BITS)
        self._eos_ids = table.eos_ids

    def make(self, rows: Sequence[tuple[GrammarMatcher, Sequence[int]]]) -> np.ndarray:
        """Masks u32[places, ceil(vocab / 32)]: for each matcher one, and one more behind each of its drafts.

        Places behind a draft that the grammar forbids are free: no token will be taken from there. Bit t % 32 of word
        t // 32 is token t. A matcher that has met an error leaves a mask of any kind.

        # drafts   | a b c, b forbidden |
        # masks    | M  M after a  all  all |
        """
        places = np.cumsum([0, *(1 + len(drafts) for _, drafts in rows)]).tolist()
        masks = np.full((places[-1], self._num_words), _ALL, np.uint32)
        alive = [
            (matcher.inner, first, list(drafts))
            for (matcher, drafts), first in zip(rows, places, strict=False)
            if not (matcher.has_ended or matcher.inner.is_error())
        ]
        where = masks.ctypes.data, self._num_words * masks.itemsize, places[-1]
        if plain := [(inner, first) for inner, first, drafts in alive if not drafts]:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        if drafting := [row for row in alive if row[2]]:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafting, *where)
        for (matcher, drafts), first in zip(rows, places, strict=False):
            self._end(masks[first : first + 1 + len(drafts)], matcher, drafts)
        return masks

    def _end(self, masks: np.ndarray, matcher: GrammarMatcher, drafts: Sequence[int]) -> None:
        """What ends the sequence is allowed where EOS is, and alone behind an end."""
        if matcher.end_ids.issuperset(self._eos_ids) and len(matcher.end_ids) > len(self._eos_ids):
            word, bit = divmod(self._eos_ids[0], _BITS)
            masks[(masks[:, word] >> np.uint32(bit)) & 1 == 1] |= self._ends(matcher)
        ended = 0 if matcher.has_ended else next((i + 1 for i, d in enumerate(drafts) if d in matcher.end_ids), None)
        if ended is not None:
            masks[ended:] = self._ends(matcher)

    def _ends(self, matcher: GrammarMatcher) -> np.ndarray:
        words = np.zeros(self._num_words, np.uint32)
        for token_id in matcher.end_ids:
            words[token_id // _BITS] |= np.uint32(1 << token_id % _BITS)
        return words
