"""Clients that hang up: what they asked for stops, and its memory is free again."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from tests.e2e.server import NAME, ServerProcess, wait_for

FREED_WITHIN_S = 3.0  # a second on an idle machine


def post_and_leave_open(server: ServerProcess, streams: bool) -> socket.socket:
    """Send a request that would run for many seconds; gives the open connection."""
    body = {"model": NAME, "prompt": "Count: 1, 2,", "max_tokens": 400, "ignore_eos": True, "n": 2, "stream": streams}
    data = json.dumps(body).encode()
    address = urlsplit(server.url)
    assert address.hostname and address.port
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("streams", [True, False], ids=["streamed", "whole"])
def test_a_client_that_hangs_up_frees_its_slots_and_blocks(server, client, streams):
    with closing(post_and_leave_open(server, streams)) as connection:
        wait_for(lambda: server.metric("num_requests_running") == 2, 20, "both sequences running")
        assert server.metric("kv_cache_usage_perc") > 0
        if streams:
            assert b"200 OK" in connection.recv(4096)
    left_s = time.monotonic()
    wait_for(lambda: server.metric("num_requests_running") == 0, FREED_WITHIN_S, "no request running")
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("num_requests_waiting") == 0
    assert time.monotonic() - left_s < FREED_WITHIN_S
    assert client.completions.create(model=NAME, prompt="Hello", max_tokens=2).usage.completion_tokens == 2


def test_many_clients_that_hang_up_at_once_leave_nothing_behind(server):
    connections = [post_and_leave_open(server, streams=bool(number % 2)) for number in range(10)]
    wait_for(lambda: server.metric("num_requests_waiting") >= 4, 20, "more requests than run at once")
    for connection in connections:
        connection.close()
    wait_for(lambda: server.metric("num_requests_running") == 0, FREED_WITHIN_S, "no request running")
    wait_for(lambda: server.metric("num_requests_waiting") == 0, FREED_WITHIN_S, "no request waiting")
    assert server.metric("kv_cache_usage_perc") == 0
