"""Makes the Mosaic GPU interpreter of JAX 0.10 compile a kernel once, as later versions do, not once a thread block."""

import importlib
import threading
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def compiled_once(monkeypatch) -> Iterator[None]:
    """For kernels of several warpgroups: without it each of their thread blocks takes seconds."""
    if jax.__version_info__ >= (0, 11):
        yield
        return
    lock, programs = threading.Lock(), {}

    def evaluate(jaxpr, consts, *args):
        jax.core.eval_jaxpr(jaxpr, consts, *args)

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in programs:
                programs[jaxpr] = jax.jit(evaluate, static_argnums=0).trace(jaxpr, consts, *args).lower().compile()
        programs[jaxpr](consts, *args)

    threads = importlib.import_module("jax._src.pallas.mosaic.interpret.thread_map")
    monkeypatch.setattr(threads, "_run_jaxpr", run)
    yield
