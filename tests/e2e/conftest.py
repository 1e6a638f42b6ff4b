"""One real server with a real model for nearly all tests of this folder, and the clients that talk to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.server import MODEL, NAME, SMALL_SHAPES, ServerProcess

LAST = "test_ending.py"  # it kills the engine, then ends the server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that end the shared server after all others of this folder, in whatever order they were given."""
    folder = Path(__file__).parent
    places = [index for index, item in enumerate(items) if item.path.is_relative_to(folder)]
    ordered = sorted((items[index] for index in places), key=lambda item: item.path.name == LAST)
    for index, item in zip(places, ordered, strict=True):
        items[index] = item


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server that all tests of this folder share."""
    log = tmp_path_factory.mktemp("server") / "log"
    with ServerProcess(log, MODEL, "--served-model-name", NAME, *SMALL_SHAPES) as running:
        yield running


@pytest.fixture(scope="package")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    """OpenAI's own client; it does not try again, so that no failure is hidden."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as openai:
        yield openai


@pytest.fixture
async def async_client(server: ServerProcess) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's own client for many requests at once."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as openai:
        yield openai


@pytest.fixture(scope="package")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """A plain client, for what OpenAI's cannot send."""
    with httpx.Client(base_url=server.url, timeout=120) as plain:
        yield plain
