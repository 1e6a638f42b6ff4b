"""Joining without engines: hosts that are slow to know their model, a leader that is another one, stray messages."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import zmq
import zmq.asyncio

from jaxserve.config import Config, config_from_values
from jaxserve.engine.hosts import facts, follower, leader, messages
from jaxserve.engine.hosts.follower import Follower
from jaxserve.engine.hosts.leader import HostGroup
from jaxserve.engine.hosts.plans import FollowingHosts, LeadingHosts
from jaxserve.engine.hosts.ray_workers import RayWorkers
from jaxserve.engine.hosts.session import HostSession
from jaxserve.engine.hosts.sockets import free_port
from jaxserve.errors import CheckpointError, JaxserveError
from tests.e2e.tiny_model import write_config

WAIT_S = 0.4  # dist_timeout_s
LIMIT_S = 20  # of a busy machine
STRAY = [[b""], [b"\xc1"], [b"\xa2\xff\xfe"], [b"GET / HTTP/1.1", b"Host: here"], [b"", b"", b""]]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """That of rank 0; a follower asks often, and both give up soon."""
    monkeypatch.setattr(messages, "JOIN_INTERVAL_S", 0.05)
    return config_from_values(
        {
            "model": str(write_config(tmp_path / "model")), "load_format": "dummy", "tensor_parallel_size": 2,
            "nnodes": 2, "dist_init_addr": f"127.0.0.1:{free_port('127.0.0.1')}", "dist_timeout_s": WAIT_S,
        }
    )  # fmt: skip


class Download:
    """Keeps a host from knowing its model until it is over, or fails."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None = None) -> None:
        """Let the host know its model, or that it will not."""
        self._error = error
        self._is_over.set()

    def facts_of(self, config: Config) -> dict[str, str]:
        """In place of `facts.facts_of`."""
        assert self._is_over.wait(LIMIT_S)
        if self._error is not None:
            raise self._error
        return facts.facts_of(config)


@pytest.fixture
def download() -> Iterator[Download]:
    download = Download()
    yield download
    download.end()


def follow(config: Config) -> asyncio.Task[None]:
    return asyncio.create_task(Follower(config.with_values(node_rank=1)).run())


@asynccontextmanager
async def opened(config: Config) -> AsyncIterator[HostGroup]:
    group = HostGroup(config)
    await group.open()
    try:
        yield group
    finally:
        await group.close()


async def test_a_follower_waits_while_the_leader_reads_its_model(config, download, monkeypatch):
    monkeypatch.setattr(leader, "facts_of", download.facts_of)
    group = HostGroup(config)
    opening = asyncio.create_task(group.open())
    following = follow(config)
    await asyncio.wait({opening, following}, timeout=3 * WAIT_S)
    assert not following.done()
    download.end()
    await opening
    await asyncio.wait_for(group.gather(), LIMIT_S)
    await group.close()
    await asyncio.wait_for(following, LIMIT_S)


async def test_the_leader_waits_while_a_follower_reads_its_model(config, download, monkeypatch):
    monkeypatch.setattr(follower, "facts_of", download.facts_of)
    async with opened(config) as group:
        following = follow(config)
        gathering = asyncio.create_task(group.gather())
        await asyncio.wait({gathering, following}, timeout=3 * WAIT_S)
        assert not gathering.done() and not following.done()
        download.end()
        await asyncio.wait_for(gathering, LIMIT_S)
    await asyncio.wait_for(following, LIMIT_S)


async def test_a_follower_joins_the_leader_that_comes_after_the_one_it_asked(config):
    assert config.parallel.dist_init_addr is not None
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as first:
        first.bind(f"tcp://{config.parallel.dist_init_addr}")
        following = follow(config)
        await asyncio.wait_for(first.recv_multipart(), LIMIT_S)
    async with opened(config) as group:
        await asyncio.wait_for(group.gather(), LIMIT_S)
    await asyncio.wait_for(following, LIMIT_S)


class SlowToEnd:
    """An engine process whose end takes an hour of the follower's clock."""

    def __init__(self) -> None:
        self.now_s = 0.0

    async def end(self) -> None:
        """As `EngineChild`'s."""
        self.now_s += 3600


async def test_a_leader_is_not_silent_while_the_follower_ends_its_engine_process(config, monkeypatch):
    child = SlowToEnd()
    monkeypatch.setattr(follower, "time", SimpleNamespace(monotonic=lambda: child.now_s))
    one = Follower(config.with_values(node_rank=1))
    monkeypatch.setattr(one, "_child", child)
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as first:
        first.bind(f"tcp://{config.parallel.dist_init_addr}")
        following = asyncio.create_task(one.run())
        identity, _ = await asyncio.wait_for(first.recv_multipart(), LIMIT_S)
        for message in (messages.Accepted(), messages.StopWorker(), messages.Goodbye(None)):
            await first.send_multipart([identity, messages.encode(message)])
        await asyncio.wait_for(following, LIMIT_S)
    assert child.now_s == 3600


async def test_what_the_leader_cannot_read_ends_the_hosts_that_wait(config, download, monkeypatch):
    monkeypatch.setattr(leader, "facts_of", download.facts_of)
    group = HostGroup(config)
    opening = asyncio.create_task(group.open())
    following = follow(config)
    await asyncio.wait({opening, following}, timeout=WAIT_S)
    download.end(CheckpointError("no such model"))
    with pytest.raises(CheckpointError) as raised:
        await opening
    await group.close(raised.value)
    with pytest.raises(CheckpointError, match="no such model"):
        await asyncio.wait_for(following, LIMIT_S)


async def test_a_host_that_cannot_read_its_model_says_so(config, download, monkeypatch):
    monkeypatch.setattr(follower, "facts_of", download.facts_of)
    download.end(CheckpointError("no such model"))
    with pytest.raises(CheckpointError, match="no such model"):
        await asyncio.wait_for(follow(config), LIMIT_S)


async def test_stray_messages_are_dropped(config, caplog):
    async with opened(config) as group:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 1000)
            stranger.connect(f"tcp://{config.parallel.dist_init_addr}")
            for frames in STRAY:
                await stranger.send_multipart(frames)
        following = follow(config)
        await asyncio.wait_for(group.gather(), LIMIT_S)
    await asyncio.wait_for(following, LIMIT_S)
    assert caplog.text.count("a message that is none of a follower's came to") == len(STRAY)


async def test_a_leader_that_does_not_listen_any_more_says_so(config, monkeypatch, caplog):
    async with opened(config) as group:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as member:
            member.connect(f"tcp://{config.parallel.dist_init_addr}")
            await member.send(messages.encode(messages.Join(1, facts.facts_of(config))))
            await asyncio.wait_for(member.recv(), LIMIT_S)
            group.begin()
            monkeypatch.setattr(messages, "decode_to_leader", lambda data: 1 / 0)
            await member.send(messages.encode(messages.Alive()))
            failure = await asyncio.wait_for(group.failure, LIMIT_S)
        assert failure.cause == "node rank 0 listens to no host any more: ZeroDivisionError: division by zero"
        with pytest.raises(JaxserveError, match="listens to no host any more"):
            await group.gather()
        assert failure.cause in caplog.text


def test_stray_messages_to_the_engine_processes_are_dropped(caplog):
    plans = f"127.0.0.1:{free_port('127.0.0.1')}"
    session = HostSession(session_id=1, rank=0, num_hosts=2, coordinator=plans, plans=plans, timeout_s=5)
    leading = LeadingHosts(session)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger, context.socket(zmq.DEALER) as impostor:
        impostor.setsockopt(zmq.IDENTITY, b"7")
        for socket in (stranger, impostor):
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(f"tcp://{plans}")
        for frames in STRAY:
            stranger.send_multipart(frames)
        impostor.send(b"\x93\xa5Value\xa1a\xa1b")
    following = FollowingHosts(msgspec.structs.replace(session, rank=1))
    for hosts in (leading, following):
        hosts._socket.setsockopt(zmq.RCVTIMEO, LIMIT_S * 1000)
    with ThreadPoolExecutor(1) as other:
        for _ in range(len(STRAY) + 1):  # each reads from every socket that has something to say
            answer = other.submit(following.gather, "name", "theirs")
            assert leading.gather("name", "ours") == ["ours", "theirs"] == answer.result(LIMIT_S)
    following.close()
    leading._socket.context.destroy()
    assert caplog.text.count("a message that is none of a follower's came to") == len(STRAY) + 1


async def test_a_start_that_is_interrupted_beside_its_followers_is_cancelled(config):
    pytest.importorskip("ray", reason="needs the extra 'ray'", exc_type=ImportError)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    running = asyncio.create_task(RayWorkers(config).run_beside(work()))
    await asyncio.wait_for(begun.wait(), LIMIT_S)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, LIMIT_S)
    assert ended.is_set()
