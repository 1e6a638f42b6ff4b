"""Fixtures of the API's tests: an app over `FakeEngine`, in this process or behind a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from starlette.testclient import TestClient

from api.app import create_app
from jaxserve.config import ServerSettings
from tests.api.live_server import Running, running
from tests.fakes import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    return TestClient(create_app(engine, ServerSettings()))


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    """One server for a module's tests; a test that scripts its engine resets it."""
    with running(FakeEngine()) as run:
        yield run


Poll = Callable[[Callable[[], bool]], None]


@pytest.fixture
def eventually() -> Poll:
    """Wait until a condition holds; fails after five seconds."""

    def wait(condition: Callable[[], bool]) -> None:
        clock = threading.Event()
        for _ in range(500):
            if condition():
                return
            clock.wait(0.01)
        raise AssertionError("the condition never came true")

    return wait
