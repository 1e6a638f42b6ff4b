"""From a checkpoint's tensors to the model's parameters: the loader that applies a model's weight rules."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from jaxserve.errors import CheckpointError
from jaxserve.models.base import WeightRule
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.safetensors_files import name_list

# Buffers that old checkpoints carry and nobody needs: they follow from the config.
DEFAULT_IGNORED = (r".*rotary_emb\.inv_freq", r".*\.attn\.masked_bias", r".*\.attn\.bias")
TIED_HEAD = r"(.*\.)?lm_head\.weight"  # some writers store the matrix twice that embedding and head share
_READ_THREADS = 4
_READ_AHEAD_BYTES = 64 << 20  # keeps the threads busy beside the one large matrix of a small model

OnProgress = Callable[[str, int, int], None]  # parameter, bytes of all that are loaded, bytes in total


def load_params(
    checkpoint: Checkpoint,
    rules: Sequence[WeightRule],
    *,
    dtype: np.dtype | type,
    place: Callable[[str, np.ndarray], jax.Array],
    ignored: Sequence[str] = (),
    tie_embeddings: bool = False,
    on_progress: OnProgress | None = None,
) -> dict[str, jax.Array]:
    """Read, assemble, cast and place every parameter; all or nothing.

    All names and shapes are checked before the first byte is read. `place` puts one parameter on its devices and is
    called from this thread only, in the order of the rules. `ignored` are regular expressions of tensors that no rule
    has to use, besides `DEFAULT_IGNORED` and, with `tie_embeddings`, a second copy of the embedding. Besides what
    `place` keeps, the host holds at most the largest parameter and 64 MiB read ahead, and their sources while one is
    being assembled or cast.
    """
    check_fits(checkpoint, rules, ignored=ignored, tie_embeddings=tie_embeddings)
    sizes = [math.prod(rule.param_shape) * np.dtype(rule.dtype or dtype).itemsize for rule in rules]
    params: dict[str, jax.Array] = {}
    loaded, total = 0, sum(sizes)
    for rule, size, array in _read_ahead(checkpoint, rules, sizes, np.dtype(dtype)):
        params[rule.param] = place(rule.param, array)
        loaded += size
        if on_progress is not None:
            on_progress(rule.param, loaded, total)
    return params


def check_fits(
    checkpoint: Checkpoint, rules: Sequence[WeightRule], *, ignored: Sequence[str] = (), tie_embeddings: bool = False
) -> None:
    """Raise `CheckpointError` unless the rules use all tensors but the ignored ones, each in its own shape.

    `ignored` and `tie_embeddings` are as in `load_params`.
    """
    names = set(checkpoint.tensor_names())
    wanted = {source for rule in rules for source in rule.sources}
    if missing := sorted(wanted - names):
        raise CheckpointError(f"{checkpoint.name} lacks {len(missing)} tensors of the model: {name_list(missing)}")
    wrong = list(_wrong_shapes(checkpoint, rules))
    if wrong:
        raise CheckpointError(f"{checkpoint.name} does not fit the model: {name_list(wrong, limit=4)}")
    patterns = [re.compile(p) for p in (*DEFAULT_IGNORED, *ignored, *((TIED_HEAD,) if tie_embeddings else ()))]
    surplus = sorted(name for name in names - wanted if not any(p.fullmatch(name) for p in patterns))
    if surplus:
        raise CheckpointError(
            f"{checkpoint.name} holds {len(surplus)} tensors that the model has no place for: {name_list(surplus)}"
        )


def _wrong_shapes(checkpoint: Checkpoint, rules: Iterable[WeightRule]) -> Iterator[str]:
    for rule in rules:
        for source, wanted in zip(rule.sources, rule.shapes, strict=True):
            given = checkpoint.shape(source)
            if given != wanted:
                yield f"tensor {source!r} has shape {list(given)}, the model wants {list(wanted)}"


def _read_ahead(
    checkpoint: Checkpoint, rules: Sequence[WeightRule], sizes: Sequence[int], dtype: np.dtype
) -> Iterator[tuple[WeightRule, int, np.ndarray]]:
    """Yield the parameters in order, reading ahead in threads as long as the bytes in flight fit the budget.

    The budget is the size of the largest parameter, which reading it needs in any case, and a little.
    """
    budget = max(sizes, default=0) + _READ_AHEAD_BYTES
    waiting = deque(zip(rules, sizes, strict=True))
    running: deque[tuple[WeightRule, int, Future[np.ndarray]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read-weights") as pool:
        try:
            while waiting or running:
                while waiting and (not running or in_flight + waiting[0][1] <= budget):
                    rule, size = waiting.popleft()
                    running.append((rule, size, pool.submit(_prepare, checkpoint, rule, dtype)))
                    in_flight += size
                rule, size, future = running.popleft()
                yield rule, size, future.result()
                del future  # the array is its consumer's alone
                in_flight -= size
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare(checkpoint: Checkpoint, rule: WeightRule, dtype: np.dtype) -> np.ndarray:
    if rule.rows is None:
        tensors = [checkpoint.read(source) for source in rule.sources]
    else:
        tensors = [checkpoint.read_rows(source, rows) for source, rows in zip(rule.sources, rule.rows, strict=True)]
    try:
        array = rule.assemble(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
    if array.shape != rule.param_shape:
        raise CheckpointError(
            f"parameter {rule.param!r} came out of {name_list(list(rule.sources))} with shape {list(array.shape)}, "
            f"the model wants {list(rule.param_shape)}"
        )
    return array.astype(rule.dtype or dtype, copy=False)
