"""Timing: what a sample holds, and rates that a device could have."""

import doctest
import importlib
import time

import pytest

from pallas_kernels.benchmark import copy_rate, product_rate, time_calls


def test_a_sample_is_divided_by_the_pieces_of_all_its_calls():
    calls = []

    def run() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.004)

    timing = time_calls(run, pieces=2, at_once=3, repeats=4)
    assert len(calls) == 3 + 3 * 4  # three to warm up
    assert 0.002 <= timing.min_s <= timing.median_s < 0.02


def test_rates_are_measured():
    assert copy_rate(1 << 16) > 0
    assert product_rate(32) > 0


@pytest.mark.parametrize("name", ["tunable", "tuned_tiles", "kv_write.tiles"])
def test_the_examples_hold(name):
    results = doctest.testmod(importlib.import_module(f"pallas_kernels.{name}"))
    assert results.attempted and not results.failed
