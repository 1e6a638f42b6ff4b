"""What all tests share: eight virtual CPU devices in the test process, so that meshes are real, and a small model."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of 256 byte tokens and an end-of-sequence token; for cores that need no weights."""
    from tests.e2e.tiny_model import write_tokenizer

    folder: Path = tmp_path_factory.mktemp("tiny-model")
    return str(write_tokenizer(folder))
