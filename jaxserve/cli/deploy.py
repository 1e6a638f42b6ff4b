"""`jaxserve deploy`: several engines behind one address, as a Ray Serve application."""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING

from jaxserve.cli.flags import Launch
from jaxserve.cli.serve import DEFAULT_CORE, bind, serving_url, set_up_logging, warn_if_open
from jaxserve.config import Config
from jaxserve.deploy.resources import replica_resources
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.deploy.session import Session

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning of what this sets
}

WATCH_PERIOD_S = 2.0  # between looks at how many engines run
CONNECT_TIMEOUT_S = 5.0
_OWN_CLUSTER = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's own ports on 127.0.0.1, on Linux too
    "RAY_AUTH_MODE": "token",  # and there for this user alone
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # 5 s are too short on busy cores: proxies are killed and made anew
}


def deploy(launch: Launch) -> None:
    """Serve a model with several engines behind one address, on a Ray cluster. Ctrl-C as with serve."""
    run_deployment(launch.load())


def run_deployment(config: Config, *, core: str = DEFAULT_CORE) -> None:
    """Deploy until a signal comes. `core` is the engine core's class as "module:attribute"."""
    set_up_logging(config.server.log_level)
    replica_resources(config)  # raises what no cluster can mend
    environment = dict(_ENVIRONMENT)
    if config.deploy.ray_address is None:
        _free_port(config)
        environment |= _OWN_CLUSTER
    else:
        _check_ray_address(config.deploy.ray_address)
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        from jaxserve.deploy.session import Session
    except ImportError as error:
        raise ConfigError(f"deploy needs Ray Serve ({error}); install it: pip install 'jaxserve[ray]'") from None

    warn_if_open(config.server)
    signals = _Signals()
    session = Session(config, core=core)
    try:
        signals.install()
        session.connect()
        signals.install()  # Ray has put its own in their place
        _run(session, config, signals)
    except BaseException:
        session.close(at_once=True)
        raise
    session.close()


def _run(session: Session, config: Config, signals: _Signals) -> None:
    from jaxserve.cli.startup_display import StartupDisplay

    display = StartupDisplay()
    port = config.server.port
    if session.is_on_the_head_node:
        port = _free_port(config)
    elif port == 0:
        raise ConfigError("port 0 takes a free one of this machine, but the address will be the Ray head node's")
    session.start(port, display.show)
    display.serving(serving_url(config.server, port), config.model.served_names)
    while not signals.wait(WATCH_PERIOD_S):
        session.watch(display.show)
    session.drain()


def _free_port(config: Config) -> int:
    """The port to serve at; raises `ConfigError` where it is taken. Another process binds it, so it is let go."""
    with bind(config.server) as taken:
        return taken.getsockname()[1]


def _check_ray_address(address: str) -> None:
    """Raise `ConfigError` where nothing listens; Ray itself would try for ten minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"ray_address must be host:port or auto, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster answers at ray_address {address!r}: {error}") from None


class _Signals:
    """While starting a signal interrupts; then the first one ends `wait`, and the next one interrupts the draining."""

    def __init__(self) -> None:
        self._is_waiting = False
        self._has_come = threading.Event()

    def install(self) -> None:
        """Take SIGINT and SIGTERM; call it in the main thread."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self, timeout_s: float) -> bool:
        """Whether a signal has come, as soon as one has; False after `timeout_s`."""
        self._is_waiting = True
        return self._has_come.wait(timeout_s)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._is_waiting or self._has_come.is_set():
            raise KeyboardInterrupt
        self._has_come.set()
