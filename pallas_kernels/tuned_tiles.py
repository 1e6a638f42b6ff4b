"""Tile sizes measured on a device: `tuned/<device>/<op>.json`, written by autotune, read by each op's tiles.py."""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pallas_kernels.compat import device_kind

FOLDER = Path(__file__).parent / "tuned"

T = TypeVar("T")


class TunedTilesError(ValueError):
    """A file of tuned tiles that nobody can use."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What was measured best for one problem."""

    sizes: Mapping[str, int | str]  # those that decide: an entry fits a call of exactly these
    tiles: Mapping[str, int]
    us: Mapping[str, float]  # by case, with these tiles
    heuristic_us: Mapping[str, float]  # with the tiles that are taken without an entry; empty: they failed
    skipped: Mapping[str, str]  # other tiles, and why: did not compile, wrong, hung


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TunedFile:
    """All entries of an op on one kind of device, and where they come from."""

    op: str
    device: str
    date: str
    jax: str
    entries: tuple[Entry, ...]

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<device>/<op>.json`."""
        path = path_of(self.op, self.device, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        return path


def path_of(op: str, device: str, folder: Path) -> Path:
    """Where the tiles of an op on a kind of device are.

    >>> path_of("paged_decode", "NVIDIA H100 80GB HBM3", Path("tuned")).as_posix()
    'tuned/nvidia-h100-80gb-hbm3/paged_decode.json'
    """
    return folder / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / f"{op}.json"


def tuned_tiles(op: str, sizes: Mapping[str, int | str], make: Callable[..., T]) -> T | None:
    """The tiles measured for a problem of `sizes` on the device at hand; None where nobody measured them.

    `make` takes an entry's tiles by name and raises ValueError if there can be none of these sizes. TunedTilesError
    names the file, the entry and the reason.
    """
    path = path_of(op, device_kind(), FOLDER)
    entry = _entries(path).get(_key(sizes))
    if entry is None:
        return None
    try:
        return make(**entry["tiles"])
    except (TypeError, ValueError) as error:
        raise _unusable(path, f"the entry for {dict(sizes)} has tiles {entry['tiles']}: {error}") from error


@functools.cache
def _entries(path: Path) -> Mapping[tuple[Any, ...], Mapping[str, Any]]:
    """By sizes; read once a process."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())["entries"]
        return {_key(entry["sizes"]): {"tiles": dict(entry["tiles"])} for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, f"not a file of tuned tiles ({type(error).__name__}: {error})") from error


def _unusable(path: Path, reason: str) -> TunedTilesError:
    return TunedTilesError(f"{path}: {reason}; write it anew with `python -m pallas_kernels.autotune {path.stem}`")


def _key(sizes: Mapping[str, int | str]) -> tuple[Any, ...]:
    return tuple(sorted(sizes.items()))
