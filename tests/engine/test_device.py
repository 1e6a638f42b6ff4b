"""An engine takes its share of a GPU's memory, whoever decided how much JAX's allocator has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxserve.config import config_from_values
from jaxserve.engine.device import JAX_MEMORY_FRACTION, MEMORY_FRACTION, OLD_MEMORY_FRACTION, choose_device
from jaxserve.errors import ConfigError

START = """
import logging, os
logging.basicConfig(level="INFO")
from jaxserve.config import config_from_values
from jaxserve.engine import device
try:
    device.choose_device(config_from_values({"model": "m", "device": "cuda", "gpu_memory_utilization": 0.6}))
except device.ConfigError as error:
    assert "device 'cuda' is not available" in str(error)
print(os.environ.get(device.MEMORY_FRACTION))
"""


def started(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a fresh process with this environment makes of a start on a GPU that is not there."""
    rest = {name: value for name, value in os.environ.items() if name not in (MEMORY_FRACTION, OLD_MEMORY_FRACTION)}
    command = [sys.executable, "-c", START]
    return subprocess.run(command, env=rest | environment, capture_output=True, text=True, check=True)


def test_a_gpus_memory_is_bounded_before_jax_starts() -> None:
    assert started().stdout.strip() == "0.6"


@pytest.mark.parametrize("variable", [MEMORY_FRACTION, OLD_MEMORY_FRACTION])
def test_a_bound_that_the_user_set_stays_and_is_told(variable: str) -> None:
    done = started(**{variable: "0.5"})
    assert done.stdout.strip() == ("0.5" if variable == MEMORY_FRACTION else "None")  # JAX refuses both at once
    assert "has 0.5 of a GPU's memory" in done.stderr


@pytest.mark.parametrize(
    ("fraction", "utilization", "share"), [("0.9", 0.9, 1.0), ("0.8", 0.4, 0.5), ("0.5", 0.9, 1.0)]
)
def test_the_smaller_bound_holds(
    monkeypatch: pytest.MonkeyPatch, fraction: str, utilization: float, share: float
) -> None:
    from jaxserve.engine.device import _bound_gpu_memory

    monkeypatch.setenv(MEMORY_FRACTION, fraction)
    assert _bound_gpu_memory(utilization) == pytest.approx(share)


def test_in_a_process_that_used_jax_before_its_default_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from jaxserve.engine.device import _bound_gpu_memory

    jax.devices()
    monkeypatch.delenv(MEMORY_FRACTION, raising=False)
    assert _bound_gpu_memory(0.6) == pytest.approx(0.6 / JAX_MEMORY_FRACTION)
    assert MEMORY_FRACTION not in os.environ


def test_other_devices_limits_are_shared_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_FRACTION, "0.5")
    config = config_from_values({"model": "m", "device": "cpu", "gpu_memory_utilization": 0.7})
    assert choose_device(config) == 0.7


def test_a_bound_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MEMORY_FRACTION, "most")
    with pytest.raises(ConfigError, match="must be a number above 0, got 'most'"):
        choose_device(config_from_values({"model": "m", "device": "auto"}))
