"""What all tests share: eight virtual CPU devices, checked shapes, a way to run in several workers, a small model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import pytest

from tests import quick_compiles, type_checker

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads that share so little work wait for each other
jax.config.update("jax_num_cpu_devices", 8)  # so that meshes are real
# What a test compiles runs for milliseconds. As users' programs are compiled those of SmolLM2's servers, and, where it
# matters, of tests with the fixture `compiled_as_served` or `fused_as_served`.
quick_compiles.install()

# Before anything is imported of them: from here on every call of theirs is held to the shapes in its signature.
CHECKED = (
    *("jaxserve.cache", "jaxserve.layers", "jaxserve.models", "jaxserve.runner", "jaxserve.sampling"),
    "pallas_kernels",
)
jaxtyping.install_import_hook(CHECKED, f"{type_checker.__name__}.{type_checker.check.__name__}")

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # of several (`make test`): JAX writes its compile cache without a lock, so each keeps one of its own
    from jaxserve.weights.source import cache_dir

    folder, libraries = cache_dir() / "tests" / WORKER, cache_dir() / "native"
    libraries.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / "native").exists():
        (folder / "native").symlink_to(libraries)  # the C++ kernels are compiled once: that is done under a lock
    os.environ["JAXSERVE_CACHE_DIR"] = str(folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file share a worker, as do all of e2e and all of deploy, which share a server; of kernels, nothing."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.startswith("tests/kernels/"):
                return nodeid
            shared = [folder for folder in ("tests/e2e", "tests/deploy") if file.startswith(f"{folder}/")]
            return shared[0] if shared else file

    return Scheduler(config, log)


@pytest.fixture(scope="module")
def compiled_as_served() -> Iterator[None]:
    """For tests that look at single bits, which hang on how LLVM arranges sums; for the rest of a file."""
    with quick_compiles.as_served():
        yield


@pytest.fixture(scope="module")
def fused_as_served() -> Iterator[None]:
    """For tests that read a program: what it copies, holds and sends; for the rest of a file."""
    with quick_compiles.as_served(quick_llvm=True):
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 256 byte tokens and an end-of-sequence token; for cores that need no weights."""
    from tests.e2e.tiny_model import write_tokenizer

    folder: Path = tmp_path_factory.mktemp("tiny-model")
    return str(write_tokenizer(folder))
