"""`PagedDevice`: runs plans on a KV pool of token-prefix hashes, which shows any wrong block, slot or token at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

from jaxserve.outputs import FinishReason, TokenLogprobs
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import NewSlot, RowError, StepPlan, StepResult

VOCAB_SIZE = 100
EOS = 0  # rare enough in what `sampled` gives that most sequences reach their length


def make_request(request_id: str, prompt: list[int], *, eos: list[int] | None = None, **fields) -> EngineRequest:
    """An engine request; `fields` of EngineRequest go there, the others to SamplingParams."""
    names = ("priority", "arrival_time_s", "cache_salt", "adapter")
    own = {name: fields.pop(name) for name in names if name in fields}
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        eos_token_ids=[EOS] if eos is None else eos,
        sampling_params=SamplingParams(**fields),
        **own,
    )


def prefix_hashes(token_ids: list[int], request: EngineRequest) -> list[int]:
    """For each position a number that stands for the K and V there: of all tokens so far, adapter and salt."""
    value = crc32(repr((request.adapter, request.cache_salt)).encode())
    hashes = []
    for token_id in token_ids:
        value = ((value ^ token_id) * 0x9E3779B97F4A7C15 + 1) % 2**64
        hashes.append(value)
    return hashes


def sampled(prefix_hash: int) -> int:
    """The token that follows a prefix."""
    return (prefix_hash >> 32) % VOCAB_SIZE


def expected_output(request: EngineRequest, token_limit: int) -> tuple[list[int], FinishReason, int | None]:
    """What the request must yield whatever it is batched with: tokens, reason and stop token."""
    params = request.sampling_params
    token_ids = list(request.prompt_token_ids)
    limit = min(token_limit, len(token_ids) + (params.max_tokens or token_limit))
    while True:
        token_ids.append(sampled(prefix_hashes(token_ids, request)[-1]))
        output = token_ids[len(request.prompt_token_ids) :]
        if len(output) >= params.min_tokens:
            if token_ids[-1] in request.eos_token_ids and not params.ignore_eos:
                return output, FinishReason.STOP, None
            if token_ids[-1] in (params.stop_token_ids or ()):
                return output, FinishReason.STOP, token_ids[-1]
        if len(token_ids) >= limit:
            return output, FinishReason.LENGTH, None


@dataclass
class _Slot:
    new: NewSlot
    request: EngineRequest
    token_ids: list[int]
    block_ids: list[int]
    hashes: list[int] = field(default_factory=list)


class PagedDevice:
    """Runs each plan when it is dispatched; tokens stay here until the result is asked for, as on a real device."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.requests: dict[str, EngineRequest] = {}  # what was added, for adapter and salt
        self.failing: set[str] = set()  # requests whose next row ends in an error
        self.ruled_out: set[str] = set()  # requests whose next row finds no token that their rules leave
        self.num_tokens_run = 0
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._pool: dict[tuple[int, int], int] = {}  # (block, offset) -> prefix hash
        self._slots: dict[int, _Slot] = {}
        self._last_step_id = 0

    def run(self, plan: StepPlan) -> StepResult:
        """Do a step, checking that every row finds its own prefix in its own blocks."""
        assert plan.step_id == self._last_step_id + 1
        self._last_step_id = plan.step_id
        for new in plan.new_slots:
            request = self.requests[new.request_id]
            self._slots[new.slot] = _Slot(new, request, list(new.token_ids), list(new.block_ids))
        for slot, block_ids in plan.new_blocks:
            self._slots[slot].block_ids += block_ids
        self._write(plan)
        result = StepResult(step_id=plan.step_id, token_ids=[])
        for row in range(plan.num_rows):
            self._check_reads(plan, row)
            result.token_ids.append(self._sample(plan, row, result))
        self.num_tokens_run += plan.total_num_tokens
        return result

    def _write(self, plan: StepPlan) -> None:
        written: set[tuple[int, int]] = set()
        for row, slot in enumerate(plan.slots):
            state = self._slots[slot]
            assert state.new.request_id == plan.request_ids[row]
            end = plan.starts[row] + plan.num_tokens[row]
            drafts = plan.drafts.get(row, [])
            assert end - len(drafts) <= len(state.token_ids), "a row reads a token that was never sampled"
            state.hashes = prefix_hashes([*state.token_ids[: end - len(drafts)], *drafts], state.request)
            for position in range(plan.starts[row], end):
                place = self._place(state, position)
                assert place not in written, f"two rows write {place} in one step"
                written.add(place)
                self._pool[place] = state.hashes[position]

    def _check_reads(self, plan: StepPlan, row: int) -> None:
        state = self._slots[plan.slots[row]]
        for position in range(plan.starts[row] + plan.num_tokens[row]):
            found = self._pool.get(self._place(state, position))
            assert found == state.hashes[position], f"{state.new.request_id}: position {position} is not its own"

    def _sample(self, plan: StepPlan, row: int, result: StepResult) -> list[int]:
        """The row's new tokens: as many drafts as hold, and one more."""
        state = self._slots[plan.slots[row]]
        params, request_id = state.new.sampling_params, state.new.request_id
        start, drafts = plan.starts[row], plan.drafts.get(row, [])
        end = start + plan.num_tokens[row] - len(drafts)
        assert plan.samples[row] == (end == len(state.token_ids))
        assert len(drafts) < plan.num_tokens[row] and (plan.samples[row] or not drafts)
        if request_id in self.failing:
            self.failing.discard(request_id)
            result.errors[row] = RowError("non-finite logits", taints_blocks=True)
        if request_id in self.ruled_out:
            self.ruled_out.discard(request_id)
            result.errors[row] = RowError("no token left", taints_blocks=False)
        if params.prompt_logprobs is not None and start + 1 < state.new.num_prompt_tokens:
            last = min(end, state.new.num_prompt_tokens - 1)
            entries = [_logprobs(state.token_ids[p], position=p) for p in range(start + 1, last + 1)]
            result.prompt_logprobs[row] = entries
        if not plan.samples[row]:
            return []
        token_ids: list[int] = []
        while token_ids == drafts[: len(token_ids)] and len(token_ids) <= len(drafts):
            token_ids.append(sampled(state.hashes[end - 1 + len(token_ids)]))
        state.token_ids += token_ids
        if params.logprobs is not None:
            result.logprobs[row] = [_logprobs(token_id, position=end + i) for i, token_id in enumerate(token_ids)]
        return [] if row in result.errors else token_ids

    def _place(self, state: _Slot, position: int) -> tuple[int, int]:
        block_id = state.block_ids[position // self._block_size]
        assert 0 < block_id < self._num_blocks
        return block_id, position % self._block_size


def _logprobs(token_id: int, *, position: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -float(position), 1, [], [])
