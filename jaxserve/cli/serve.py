"""`jaxserve serve`: the composition root of the server: config, engine process, HTTP app, and an orderly end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.cli.flags import Launch
from jaxserve.config import API_KEY_VARIABLE, SECTIONS, Config, ModelSettings, ServerSettings
from jaxserve.engine.spawn import spawn
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.engine.process_client import ProcessEngineClient

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells have it
DEFAULT_CORE = "jaxserve.engine.core:EngineCore"

_log = logging.getLogger("jaxserve")


def serve(launch: Launch) -> None:
    """Serve a model over HTTP, as OpenAI's API. Ctrl-C lets running requests finish; a second one ends at once."""
    given = [name for name in SECTIONS["deploy"] if name in launch.overrides]
    if given:
        raise ConfigError(f"{', '.join(given)}: only 'jaxserve deploy' runs several engines; serve runs one")
    run_server(launch.load())


def run_server(config: Config, *, core: str = DEFAULT_CORE) -> None:
    """Serve until a signal comes. `core` is the engine core's class as "module:attribute"."""
    set_up_logging(config.server.log_level)
    if config.parallel.node_rank > 0:
        from jaxserve.cli.follow import follow

        follow(config)
        return
    listening = bind(config.server)  # before the model is loaded: a port in use is known at once
    with listening:
        warn_if_open(config.server)
        _check_chat_template(config.model)
        # First of all that takes time: the engine process imports as much again, on a core of its own.
        process = spawn(core) if config.parallel.nnodes == 1 else None
        from api.server import run

        try:
            run(_serve(config, core, listening, process))
        except asyncio.CancelledError:  # SIGTERM, before the server was there to drain
            raise SystemExit(EXIT_TERMINATED) from None


async def _serve(config: Config, core: str, listening: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
    if config.parallel.distributed_executor_backend != "ray":
        await _serve_on(config, core, listening, process, start=lambda engine: engine.start())
        return
    from jaxserve.engine.hosts.ray_workers import RayWorkers

    with _sigterm_cancels():
        workers = await RayWorkers(config).start()
    try:
        await _serve_on(
            workers.config, core, listening, process, start=lambda engine: workers.run_beside(engine.start())
        )
    finally:
        await workers.stop()


async def _serve_on(
    config: Config,
    core: str,
    listening: socket.socket,
    process: subprocess.Popen[bytes] | None,
    *,
    start: Callable[[ProcessEngineClient], Coroutine[Any, Any, None]],
) -> None:
    from api.app import create_app
    from api.server import serve as serve_http
    from jaxserve.cli.startup_display import StartupDisplay
    from jaxserve.engine.heap import freeze_heap
    from jaxserve.engine.process_client import ProcessEngineClient
    from jaxserve.metrics import ServerMetrics
    from jaxserve.tokenizer.chat_template import ChatTemplate

    display = StartupDisplay()
    names = config.model.served_names
    metrics = ServerMetrics(model_name=names[0], prefix=config.server.metrics_prefix)
    engine = ProcessEngineClient(config, core=core, metrics=metrics, on_progress=display.show, process=process)
    with _sigterm_cancels():
        await start(engine)
    try:
        display.ready(engine.core_info)
        path = config.model.chat_template
        template = ChatTemplate.of_tokenizer(engine.tokenizer, path=None if path is None else Path(path))
        app = create_app(engine, config.server, metrics=metrics, chat_template=template)
        freeze_heap()
        await serve_http(
            app,
            config.server,
            on_started=lambda port: display.serving(serving_url(config.server, port), names),
            on_drain=lambda: _refuse_new(engine),
            sockets=[listening],
        )
    finally:
        await engine.shutdown()


def _check_chat_template(settings: ModelSettings) -> None:
    """Raise `TokenizerError` for a file that is missing or broken, before the model is loaded."""
    if settings.chat_template is not None:
        from jaxserve.tokenizer.chat_template import ChatTemplate

        ChatTemplate.of_file(Path(settings.chat_template))


async def _refuse_new(engine: ProcessEngineClient) -> None:
    """Let the engine take nothing new; the server waits for what runs."""
    await engine.drain(timeout_s=0)


@contextmanager
def _sigterm_cancels() -> Iterator[None]:
    """While the engine starts, let SIGTERM do what Ctrl-C does, so that the engine process ends too."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def bind(settings: ServerSettings) -> socket.socket:
    """Take the port, without listening yet; raises `ConfigError` when that fails."""
    where = f"{settings.host}:{settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {settings.host!r} is no address of this machine: {error.strerror}") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {where}: {error.strerror}; choose another with --host or --port") from None
    return listening


def set_up_logging(level: str) -> None:
    """Log to stderr from `level` up; other packages from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("jaxserve", "api", "pallas_kernels", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


def warn_if_open(settings: ServerSettings) -> None:
    """Say in the log that anybody may come in."""
    if not settings.api_key and not is_loopback(settings.host):
        _log.warning(
            "%s is reachable from other machines and no API key is set: anyone may use the model. "
            "Set --api-key or %s.", settings.host, API_KEY_VARIABLE
        )  # fmt: skip


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serving_url(settings: ServerSettings, port: int) -> str:
    """Where clients find the server."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}{settings.root_path}/v1"
