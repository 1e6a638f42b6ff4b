"""What all tests share: eight virtual CPU devices, checked shapes, a way to run in several workers, a small model."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jaxtyping
import pytest

from tests import type_checker

jax.config.update("jax_num_cpu_devices", 8)  # so that meshes are real

# Before anything is imported of them: from here on every call of theirs is held to the shapes in its signature.
CHECKED = (
    *("jaxserve.cache", "jaxserve.layers", "jaxserve.models", "jaxserve.runner", "jaxserve.sampling"),
    "pallas_kernels",
)
jaxtyping.install_import_hook(CHECKED, f"{type_checker.__name__}.{type_checker.check.__name__}")

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:  # of several (`make test`): JAX writes its compile cache without a lock, so each keeps one of its own
    from jaxserve.weights.source import cache_dir

    os.environ["JAXSERVE_CACHE_DIR"] = str(cache_dir() / "tests" / WORKER)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests must share a worker: those of the shared server, those of a file. Kernels share nothing."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder = item.path.relative_to(config.rootpath / "tests").parts[0]
        if folder == "e2e" and "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("server"))
        elif folder != "kernels":
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 256 byte tokens and an end-of-sequence token; for cores that need no weights."""
    from tests.e2e.tiny_model import write_tokenizer

    folder: Path = tmp_path_factory.mktemp("tiny-model")
    return str(write_tokenizer(folder))
