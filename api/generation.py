"""Running a job on the engine: one iterator a prompt, merged into one; closing it aborts whatever still runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from api.field_names import said_in
from api.state import ServerState
from api.to_engine import Job, engine_request_id
from jaxserve.outputs import RequestOutput

IndexedOutput = tuple[int, RequestOutput]  # which of the job's prompts, and its news


async def outputs_of(state: ServerState, job: Job) -> AsyncGenerator[IndexedOutput, None]:
    """Yield every output of the job as it comes."""
    if len(job.prompts) == 1:
        async with aclosing(_outputs_of_prompt(state, job, 0)) as outputs:
            async for output in outputs:
                yield 0, output
        return
    async with aclosing(_merged(state, job)) as merged:
        async for indexed in merged:
            yield indexed


async def final_outputs(state: ServerState, job: Job) -> list[RequestOutput]:
    """Return each prompt's last output, in the order of the prompts."""
    last: dict[int, RequestOutput] = {}
    async with aclosing(outputs_of(state, job)) as outputs:
        async for prompt_index, output in outputs:
            last[prompt_index] = output
    return [last[prompt_index] for prompt_index in range(len(job.prompts))]


async def _outputs_of_prompt(state: ServerState, job: Job, prompt_index: int) -> AsyncGenerator[RequestOutput, None]:
    request_id = engine_request_id(job, prompt_index)
    iterator = state.engine.generate(
        job.prompts[prompt_index],
        job.params,
        request_id=request_id,
        priority=job.priority,
        cache_salt=job.cache_salt,
        add_special_tokens=job.add_special_tokens,
    )
    state.in_flight.request_ids.add(request_id)
    try:
        with said_in(job.field_names):
            async for output in iterator:
                yield output
    finally:
        state.in_flight.request_ids.discard(request_id)
        await _close(iterator)


async def _merged(state: ServerState, job: Job) -> AsyncGenerator[IndexedOutput, None]:
    """Run all prompts at once. The first error ends them all."""
    queue: asyncio.Queue[IndexedOutput | asyncio.Task[None]] = asyncio.Queue()

    async def pump(prompt_index: int) -> None:
        async with aclosing(_outputs_of_prompt(state, job, prompt_index)) as outputs:
            async for output in outputs:
                queue.put_nowait((prompt_index, output))

    pumps = [asyncio.ensure_future(pump(prompt_index)) for prompt_index in range(len(job.prompts))]
    for task in pumps:
        task.add_done_callback(queue.put_nowait)
    num_running = len(pumps)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, tuple):
                yield item
            else:
                item.result()  # raises what ended the pump, if anything did
                num_running -= 1
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _close(iterator: AsyncIterator[RequestOutput]) -> None:
    """Close the engine's iterator, which aborts a request that has not ended."""
    close = getattr(iterator, "aclose", None)  # the protocol promises an AsyncIterator; generators have this
    if close is not None:
        await close()
