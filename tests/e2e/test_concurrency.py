"""Sixteen requests at once, twice as many as run together: each answer is the one it gets alone."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from tests.e2e.server import NAME

NUM_REQUESTS = 16
TOPICS = ["the rivers", "a cat's day", "the old bridge", "how bread is made", "the sea"]
COMMON = "This is one of many short texts that were written for children. "


def request(number: int) -> dict[str, Any]:
    """Half of them greedy, half seeded; of several lengths, with and without a shared beginning."""
    topic = TOPICS[number % len(TOPICS)]
    sampling = {"temperature": 0} if number % 2 else {"temperature": 0.9, "top_p": 0.95, "seed": 100 + number}
    return {
        "model": NAME,
        "prompt": f"{COMMON * (number % 3)}Chapter {number}, about {topic}. It was",
        "max_tokens": 4 + number % 4,
        "extra_body": {"ignore_eos": True},
    } | sampling


async def answer(client: AsyncOpenAI, number: int) -> str:
    """The text of a request; every third one is streamed."""
    if number % 3:
        whole = await client.completions.create(**request(number))
        return whole.choices[0].text
    stream = await client.completions.create(**request(number), stream=True)
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


async def test_requests_at_once_get_the_answers_they_get_alone(async_client):
    together = await asyncio.gather(*(answer(async_client, number) for number in range(NUM_REQUESTS)))
    alone = [await answer(async_client, number) for number in range(NUM_REQUESTS)]
    assert together == alone
    assert len(set(alone)) > NUM_REQUESTS * 0.8  # short answers may coincide
