"""Kernels for NVIDIA GPUs in the interpreter's race detector: no copy and no warpgroup runs ahead of what it needs.

Accesses of the same bytes by warpgroups and bulk copies must be put in order by barriers, waits and fences. Each of
those is also left out once. Then there is a race, or a barrier is at another phase than who waits for it thinks, or a
copy is under way at the end: what nobody misses would not be missed in the kernel either.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import gpu_interpret_params, gpu_interpreter_models_memory
from pallas_kernels.kv_write.cases import Case
from pallas_kernels.paged_attention.cases import make_inputs
from pallas_kernels.paged_attention.mosaic_gpu.tiles import DecodeTiles, PrefillTiles
from tests.kernels import interpreted, test_gpu_decode, test_gpu_kv_write, test_gpu_prefill
from tests.kernels.left_out import Waits, not_missed

pytest_plugins = ("tests.kernels.gpu_interpreter",)
pytestmark = pytest.mark.usefixtures("few_reads_at_once")

_WRITTEN = Case(name="distinct_slots", slots=tuple(range(95, 63, -2)), kv_heads=2, dtype="bfloat16")


@pytest.fixture(autouse=True)
def _races_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, "gpu", lambda: gpu_interpret_params(detect_races=True))


def decode() -> None:
    """Rings that wrap, a last tile of keys with unread ones, a row that is split and merged and two that are not."""
    case = test_gpu_decode.BY_NAME["split_rows_with_sinks"]
    tiles = DecodeTiles(kv_tile=64, stages=2, query_stages=1)
    test_gpu_decode.decode(case, make_inputs(case), num_sms=2, tiles=tiles)


def prefill() -> None:
    """More tiles of keys than stages, the last with unread ones; tiles of queries that are full and that are not."""
    case = test_gpu_prefill.case(name="ends_among_keys", rows=((330, 34),), head_dim=128)
    test_gpu_prefill.attend(case, tiles=PrefillTiles(block_kv=64, stages=2))


def kv_write() -> None:
    (k, v), pools, slots = test_gpu_kv_write.make_inputs(_WRITTEN)
    test_gpu_kv_write.interpret(k, v, *pools, slots, detect_races=True)


def rotate_and_write() -> None:
    projections = test_gpu_kv_write.make_projections(_WRITTEN, 2)
    jax.block_until_ready(test_gpu_kv_write.interpret_rotation(*projections, detect_races=True))


def watch(waits: Waits, *names: str) -> AbstractContextManager[object]:
    return mock.patch.multiple(plgpu, **{name: waits.watched(name, getattr(plgpu, name)) for name in names})


def watch_all(waits: Waits) -> AbstractContextManager[object]:
    return watch(waits, "barrier_wait", "wait_smem_to_gmem", "commit_smem")


def fails(kernel: Callable[[], None], capfd: pytest.CaptureFixture[str]) -> bool:
    """Whether the interpreter raises, or prints that it found a race, as versions before 0.12 do."""
    try:
        kernel()
        raised = False
    except jax.errors.JaxRuntimeError:
        raised = True
    return "RACE DETECTED" in capfd.readouterr().out or raised


@pytest.mark.parametrize("kernel", [decode, prefill, kv_write, rotate_and_write])
def test_nothing_races(kernel, capfd, compiled_once):
    assert not fails(kernel, capfd)


def test_a_copy_that_nobody_waited_for_races(capfd):
    assert not not_missed(lambda: fails(rotate_and_write, capfd), lambda waits: watch(waits, "barrier_wait"))


@pytest.mark.skipif(
    not gpu_interpreter_models_memory(), reason="before JAX 0.12 kernels without a wait hang, and fences are not known"
)
@pytest.mark.parametrize(
    ("kernel", "unseen"),
    [
        # A product reads as copies do, the interpreted one as loads do, which need no fence after stores. At the end
        # stages are waited for that nobody fills again, and a turn that nobody takes: barriers want it, not memory.
        (decode, {"commit_smem in _Decode._zero_unseen_values": 1, "barrier_wait in _Decode._drain": 1}),
        (
            prefill,
            {
                "commit_smem in _Prefill._zero_unread": 1,
                "barrier_wait in _Prefill._produce": 2,
                "barrier_wait in _take_turn": 1,
            },
        ),
        (kv_write, {"commit_smem in kv_write_mosaic_gpu": 1}),  # from copies to copies
        (rotate_and_write, {}),
    ],
)
def test_each_wait_is_missed_when_it_is_left_out(kernel, unseen, capfd):
    assert not_missed(lambda: fails(kernel, capfd), watch_all) == unseen
