"""What all tests share: eight virtual CPU devices in the test process, checked shapes, and a small model."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 256 byte tokens and an end-of-sequence token; for cores that need no weights."""
    from tests.e2e.tiny_model import write_tokenizer

    folder: Path = tmp_path_factory.mktemp("tiny-model")
    return str(write_tokenizer(folder))
