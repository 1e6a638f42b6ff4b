"""What happens when the engine process dies, when its parent dies, and that neither leaves anything behind."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from jaxserve.engine.client import EngineState
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.errors import EngineDeadError, JaxserveError, PromptTooLongError
from jaxserve.outputs import FinishReason
from jaxserve.sampling_params import SamplingParams
from tests.engine.fake_core import CRASH, KILL

OPEN_END = SamplingParams(output_kind="final_only")


async def collect(iterator):
    return [output async for output in iterator]


async def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        await asyncio.sleep(0.01)


def wait_until_gone(pid, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


async def test_a_killed_engine_fails_all_requests_at_once_and_comes_back(fake_client):
    async with fake_client() as client:
        requests = [
            asyncio.create_task(collect(client.generate("abc", OPEN_END, request_id=f"r{i}"))) for i in range(5)
        ]
        await asyncio.sleep(0.05)
        first_pid = client.engine_pid

        os.kill(first_pid, signal.SIGKILL)
        start_s = time.monotonic()
        results = await asyncio.gather(*requests, return_exceptions=True)

        assert time.monotonic() - start_s < 0.3
        assert all(isinstance(result, EngineDeadError) for result in results)
        assert "killed by SIGKILL" in str(results[0])
        assert client.health.state is EngineState.RESTARTING
        with pytest.raises(EngineDeadError, match="restarting"):
            await collect(client.generate("abc", OPEN_END, request_id="meanwhile"))
        await wait_for(lambda: client.health.state is EngineState.READY)
        assert (client.health.num_restarts, client.num_live_requests) == (1, 0)
        assert client.engine_pid != first_pid
        *_, last = await collect(client.generate("abc", SamplingParams(max_tokens=4), request_id="r0"))
        assert last.outputs[0].text == "abca"


@pytest.mark.parametrize(("command", "words"), [(CRASH, "exit code 4"), (KILL, "SIGKILL")])
async def test_an_engine_that_dies_of_a_step_fails_its_requests(fake_client, command, words):
    async with fake_client() as client:
        with pytest.raises(EngineDeadError, match=words):
            await collect(client.generate([command], SamplingParams(), request_id="r"))
        await wait_for(lambda: client.health.state is EngineState.READY)


async def test_an_answer_that_was_complete_before_the_death_is_still_read(fake_client):
    async with fake_client() as client:
        iterator = client.generate("abc", SamplingParams(max_tokens=3), request_id="r")
        await anext(iterator)
        await wait_for(lambda: not client._live.get("r").unfinished_ids)
        os.kill(client.engine_pid, signal.SIGKILL)
        await wait_for(lambda: client.health.state is EngineState.RESTARTING)

        *_, last = await collect(iterator)

    assert last.outputs[0].finish_reason is FinishReason.LENGTH


async def test_what_the_engine_said_before_it_died_is_heard_by_a_busy_parent(fake_client):
    async with fake_client({"step_s": 0.002}) as client:
        iterator = client.generate("abc", SamplingParams(max_tokens=50), request_id="r")
        await anext(iterator)
        time.sleep(0.5)  # the event loop hears nothing meanwhile; the engine answers and dies
        os.kill(client.engine_pid, signal.SIGKILL)
        await asyncio.sleep(0)
        time.sleep(0.2)

        *_, last = await collect(iterator)

    assert last.outputs[0].finish_reason is FinishReason.LENGTH


async def test_an_engine_that_dies_too_often_stays_dead(fake_client):
    async with fake_client(max_num_engine_restarts=2) as client:
        for _ in range(3):
            await wait_for(lambda: client.health.state is EngineState.READY)
            os.kill(client.engine_pid, signal.SIGKILL)
            await wait_for(lambda: client.health.state is not EngineState.READY)
        await wait_for(lambda: client.health.state is EngineState.DEAD)

        assert "died 3 times" in client.health.detail
        with pytest.raises(EngineDeadError, match="dead"):
            await collect(client.generate("abc", OPEN_END, request_id="r"))


async def test_restarts_that_fail_count_as_deaths(fake_client, tmp_path):
    poison = tmp_path / "poison"
    async with fake_client({"start": "kill", "unless": str(poison)}, max_num_engine_restarts=2) as client:
        poison.touch()
        os.kill(client.engine_pid, signal.SIGKILL)
        await wait_for(lambda: client.health.state is EngineState.DEAD)

    assert "while it started" in client.health.detail


async def test_an_engine_started_again_is_served_with_what_it_has_room_for(fake_client, tmp_path):
    changes = tmp_path / "info.json"
    async with fake_client({"info": str(changes)}) as client:
        created_s = client.model_info.created_s
        changes.write_text('{"max_model_len": 10, "num_blocks": 7}')
        os.kill(client.engine_pid, signal.SIGKILL)
        await wait_for(lambda: client.health.num_restarts == 1)

        assert (client.core_info.num_blocks, client.model_info.max_model_len) == (7, 10)
        assert client.model_info.created_s == created_s
        assert 'num_gpu_blocks="7"' in client.metrics.render().decode()
        with pytest.raises(PromptTooLongError, match="context takes 10"):
            await collect(client.generate("a" * 12, SamplingParams(), request_id="r"))


async def test_an_engine_that_comes_back_with_another_model_is_refused(fake_client, tmp_path):
    changes = tmp_path / "info.json"
    async with fake_client({"info": str(changes)}, max_num_engine_restarts=1) as client:
        changes.write_text('{"fingerprint": "fp_other"}')
        os.kill(client.engine_pid, signal.SIGKILL)
        await wait_for(lambda: client.health.state is EngineState.DEAD)

    assert "serves another model (fp_other, not fp_fake)" in client.health.detail


async def test_sigterm_ends_the_engine_cleanly(fake_client, tmp_path):
    record = tmp_path / "record"
    async with fake_client({"record": str(record)}) as client:
        os.kill(client.engine_pid, signal.SIGTERM)
        await wait_for(lambda: client.health.num_restarts == 1)

    assert record.read_text().splitlines()[0] == "shutdown"


async def test_sigterm_ends_a_start_whose_threads_are_busy(make_config):
    heard = asyncio.Event()
    config = make_config({"start": "in_threads"})
    client = ProcessEngineClient(config, core="tests.engine.fake_core:FakeCore", on_progress=lambda text: heard.set())
    starting = asyncio.create_task(client.start())
    await heard.wait()
    await asyncio.sleep(1)  # the core's threads are at work
    os.kill(client.engine_pid, signal.SIGTERM)
    with pytest.raises(JaxserveError, match=f"exit code {128 + signal.SIGTERM} while it started"):
        await asyncio.wait_for(starting, 15)


async def test_the_engine_leaves_ctrl_c_to_its_parent(fake_client):
    async with fake_client() as client:
        os.kill(client.engine_pid, signal.SIGINT)
        *_, last = await collect(client.generate("abc", SamplingParams(max_tokens=50), request_id="r"))

    assert last.outputs[0].finish_reason is FinishReason.LENGTH
    assert client.health.num_restarts == 0


async def test_metrics_survive_a_restart(fake_client):
    async with fake_client() as client:
        os.kill(client.engine_pid, signal.SIGKILL)
        await wait_for(lambda: client.health.num_restarts == 1)

    assert b'jaxserve:engine_restarts_total{engine="0",model_name="tiny"} 1.0' in client.metrics.render()


async def test_a_start_that_is_given_up_leaves_nothing_behind(fake_client, private_tmp):
    async def start():
        async with fake_client({"start_s": 60}):
            pass

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(start(), timeout=0.5)

    assert children() == []
    assert list(private_tmp.iterdir()) == []


async def test_the_socket_folder_is_private_and_gone_once_connected(fake_client, private_tmp):
    async with fake_client({"start_s": 0.3}) as client:
        assert list(private_tmp.iterdir()) == []
        assert client.health.state is EngineState.READY
    assert children() == []


def children():
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def private_tmp(monkeypatch):
    """A temporary folder of this test alone, short enough for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


PARENT = """
import asyncio, sys
from jaxserve.config import load_config
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.sampling_params import SamplingParams

async def main():
    config = load_config(None, {"model": sys.argv[1], "hf_overrides": {"step_s": 0.01, "start_s": float(sys.argv[2])}})
    client = ProcessEngineClient(config, core="tests.engine.fake_core:FakeCore",
                                 on_progress=lambda text: print(text, flush=True))
    async with client:
        print("engine", client.engine_pid, flush=True)
        async for _ in client.generate("abc", SamplingParams(), request_id="r"):
            pass

asyncio.run(main())
"""


@pytest.fixture
def run_parent(model_dir, private_tmp):
    """Starts a parent process in a process group of its own, up to the wanted line of its output."""
    parents = []

    def start(*, start_s=0.0):
        environment = {**os.environ, "TMPDIR": str(private_tmp), "PYTHONPATH": os.getcwd()}
        parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, model_dir, str(start_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            process_group=0,
        )
        parents.append(parent)
        assert parent.stdout.readline().startswith("engine process")
        assert parent.stdout.readline() == "loading the fake\n"
        if not start_s:
            assert parent.stdout.readline().startswith("engine ")
        [child] = psutil.Process(parent.pid).children()
        return parent, child.pid

    yield start
    for parent in parents:
        parent.kill()
        parent.wait()
        parent.stdout.close()


@pytest.mark.parametrize("start_s", [0.0, 60.0], ids=["serving", "loading"])
def test_a_killed_parent_takes_the_engine_with_it(run_parent, private_tmp, start_s):
    parent, child_pid = run_parent(start_s=start_s)

    parent.kill()
    parent.wait()

    wait_until_gone(child_pid)
    assert list(private_tmp.iterdir()) == []


@pytest.mark.parametrize("start_s", [0.0, 60.0], ids=["serving", "loading"])
def test_ctrl_c_leaves_no_process_and_no_socket_behind(run_parent, private_tmp, start_s):
    parent, child_pid = run_parent(start_s=start_s)

    os.killpg(parent.pid, signal.SIGINT)

    assert parent.wait(timeout=10) != 0
    wait_until_gone(child_pid)
    assert list(private_tmp.iterdir()) == []
