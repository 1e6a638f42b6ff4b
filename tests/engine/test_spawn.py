"""An engine process that is started before there is an order for it."""

from __future__ import annotations

import os
import signal

import pytest

from jaxserve.engine.client import EngineState
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.engine.spawn import spawn
from jaxserve.errors import JaxserveError
from tests.engine.conftest import FAKE_CORE
from tests.engine.test_process_client import wait_for

END_S = 20


def test_a_process_without_an_order_ends_with_its_parents_end_of_the_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    process = spawn(FAKE_CORE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(END_S) == 0
    assert capfd.readouterr().err == ""


def test_an_interrupt_while_a_process_still_imports_is_its_parents_business(capfd: pytest.CaptureFixture[str]) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    process = spawn(FAKE_CORE)
    os.kill(process.pid, signal.SIGINT)  # long before its first line runs
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(END_S) == 0
    assert capfd.readouterr().err == ""


async def test_the_client_takes_the_process_that_waits_and_later_starts_its_own(make_config) -> None:
    process = spawn(FAKE_CORE)
    async with ProcessEngineClient(make_config(), core=FAKE_CORE, process=process) as client:
        assert client.engine_pid == process.pid
        os.kill(process.pid, signal.SIGKILL)
        await wait_for(lambda: client.health.num_restarts == 1 and client.health.state is EngineState.READY)
        assert client.engine_pid != process.pid


async def test_a_client_that_is_never_started_leaves_no_process(make_config) -> None:
    process = spawn(FAKE_CORE)
    client = ProcessEngineClient(make_config(), core=FAKE_CORE, process=process)
    await client.shutdown()
    assert process.wait(END_S) == -signal.SIGKILL


async def test_a_core_that_cannot_be_imported_is_told_of_when_it_is_made(make_config) -> None:
    missing = "tests.engine.no_such_core:Core"
    client = ProcessEngineClient(make_config(), core=missing, process=spawn(missing))
    with pytest.raises(JaxserveError, match="no_such_core"):
        await client.start()
