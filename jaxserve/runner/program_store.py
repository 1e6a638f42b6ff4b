"""`ProgramStore`: compiled programs on disk, so that the next start neither traces nor lowers what it knows already."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import tempfile
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import jax
import psutil
from jax.experimental import serialize_executable
from jax.sharding import Mesh
from jax.stages import Compiled

import jaxserve
import pallas_kernels
from jaxserve.runner.program import Program
from pallas_kernels.native.build import processor

logger = logging.getLogger(__name__)

KEPT_DAYS = 30  # since a start last read it
_PROGRAM_NAME = re.compile(r"program-[0-9a-f]{32}")
_OURS = ("untraced-", "program-", "partial-")
_DIGEST_BYTES = hashlib.sha256().digest_size
_TRACED = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")  # packages whose code makes programs, or part of them
_VARIABLES = ("XLA_", "LIBTPU_", "JAX_")  # beginnings of names: what these say reaches the compilers


class ProgramStore:
    """Programs of one mesh, found by all that they depend on. Any thread may use it, and any process its folder.

    What JAX writes and reads here is code: the folder is its owner's alone.

    # untraced-<digest of sources, environment, description>            the name of a program's file
    # program-<digest of the lowered module, environment, description>  the program; sources may have changed elsewhere
    #     sha256 of the rest | the rest: JAX's serialised executable, compressed
    """

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        """Removes from `folder` what no start has used for `KEPT_DAYS`."""
        self._folder = folder
        self._devices = list(mesh.devices.flat)
        self._environment = environment(mesh)
        self._sources = digest_of_sources()
        self._has_failed = False  # to write an entry, and said so
        _remove_old(folder)

    def find(self, description: str, program: Program) -> Compiled | None:
        """The program of this description, untraced; None where these sources never compiled it."""
        link = self._untraced(description)
        try:
            name = link.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        if not _PROGRAM_NAME.fullmatch(name):
            logger.warning("a program is traced again: %s is damaged", link)
            return None
        compiled = self._load(self._folder / name, program)
        if compiled is not None:
            os.utime(link)
        return compiled

    def compile(self, description: str, program: Program) -> Compiled:
        """Trace and lower it; then what was compiled of the same module, or compile it. `find` knows it from now on."""
        lowered = program.lower()
        # Which of its arguments a module lacks is no part of its text, and has no public name.
        kept_arguments = sorted(lowered._lowering.compile_args["kept_var_idx"])  # type: ignore[attr-defined]
        path = self._folder / f"program-{self._digest(description, lowered.as_text(), str(kept_arguments))}"
        compiled = self._load(path, program)
        if compiled is None:
            compiled = lowered.compile()
            if not self._save(path, program, compiled):
                return compiled
        self._write(self._untraced(description), path.name.encode())
        return compiled

    def _load(self, path: Path, program: Program) -> Compiled | None:
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            digest, body = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
            if hashlib.sha256(body).digest() != digest:
                raise ValueError("it is damaged")
            compiled = serialize_executable.deserialize_and_load(
                zlib.decompress(body),
                program.arguments_tree,
                program.results_tree,
                backend=self._devices[0].client,
                execution_devices=self._devices,
            )
            os.utime(path)
        except Exception as error:  # noqa: BLE001 - whatever the runtime makes of it, the program can be compiled
            logger.warning("a program is compiled again, because %s cannot be read: %s", path, error)
            return None
        return compiled

    def _save(self, path: Path, program: Program, compiled: Compiled) -> bool:
        """Whether that was possible; where not, the log says so, once."""
        try:
            serialized, *trees = serialize_executable.serialize(compiled)
            if trees != [program.arguments_tree, program.results_tree]:
                raise ValueError(f"arguments and results are {trees}, unlike what they were said to be")
        except Exception as error:  # noqa: BLE001 - not every runtime can, and each says so in its own way
            self._say_once(error)
            return False
        body = zlib.compress(serialized, level=1)
        return self._write(path, hashlib.sha256(body).digest() + body)

    def _write(self, path: Path, entry: bytes) -> bool:
        """Others see all of an entry, or none."""
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix="partial-", delete=False) as file:
                file.write(entry)
            Path(file.name).replace(path)
        except OSError as error:
            self._say_once(error)
            return False
        return True

    def _say_once(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            logger.warning("programs are not kept for the next start: %s: %s", type(error).__name__, error)

    def _untraced(self, description: str) -> Path:
        return self._folder / f"untraced-{self._digest(description, self._sources)}"

    def _digest(self, *facts: str) -> str:
        return hashlib.sha256("\0".join((self._environment, *facts)).encode()).hexdigest()[:32]


def environment(mesh: Mesh) -> str:
    """A digest of what every program depends on beside its own module: packages, processor, devices and settings."""
    client = mesh.devices.flat[0].client
    facts = (
        sys.version,
        [(name, version(name)) for name in _TRACED],
        processor(),
        (client.platform, client.platform_version),
        [(device.id, device.device_kind) for device in mesh.devices.flat],
        tuple(mesh.shape.items()),
        sorted((name, str(value)) for name, value in jax.config.values.items() if name != "jax_compilation_cache_dir"),
        sorted((name, value) for name, value in os.environ.items() if name.startswith(_VARIABLES)),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def digest_of_sources() -> str:
    """Of everything in the packages that programs are traced from: Python, C++, tuned tiles.

    Of files that changed while this process runs nobody knows which version it has loaded: nothing has that digest.
    """
    digest = hashlib.sha256()
    start_s = psutil.Process().create_time()
    for package in (jaxserve, pallas_kernels):
        root = Path(package.__path__[0])
        for path in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}\0{len(content)}\0".encode() + content)
            if path.stat().st_mtime > start_s:
                digest.update(os.urandom(16))
    return digest.hexdigest()


def _remove_old(folder: Path) -> None:
    oldest_s = time.time() - KEPT_DAYS * 24 * 3600
    for path in folder.iterdir():
        if not path.name.startswith(_OURS):
            continue
        try:
            if path.stat().st_mtime < oldest_s:
                path.unlink()
        except FileNotFoundError:
            continue  # another start was faster
