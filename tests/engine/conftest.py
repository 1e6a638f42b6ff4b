"""Clients over the fake core, for the tests of this folder."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from jaxserve.config import Config, config_from_values
from jaxserve.engine.process_client import ProcessEngineClient
from jaxserve.tokenizer.tokenizer import Tokenizer

EOS = 256
FAKE_CORE = "tests.engine.fake_core:FakeCore"


@pytest.fixture(scope="session")
def tokenizer(model_dir) -> Tokenizer:
    return Tokenizer.from_source(model_dir)


@pytest.fixture(scope="session")
def make_config(model_dir):
    """Config of the tiny model; `script` goes to the fake core."""

    def make(script: dict | None = None, **values) -> Config:
        return config_from_values({"model": model_dir, "served_model_name": "tiny", **values}).with_values(
            hf_overrides=script or {}
        )

    return make


@pytest.fixture
def fake_client(make_config):
    """Async context manager: a started client over the fake core in its process."""

    @asynccontextmanager
    async def make(script: dict | None = None, **values):
        async with ProcessEngineClient(make_config(script, **values), core=FAKE_CORE, backoff_s=0.05) as client:
            yield client

    return make
