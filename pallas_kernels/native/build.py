"""Compiles the C++ sources into a shared library, once a machine: kept in the user's cache folder."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import platformdirs
from filelock import FileLock
from jaxlib.version import __version__ as jaxlib_version

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-pthread")
# Compiled side by side; those of a unit parse XLA's headers once.
UNITS = (("attention.cc", "kv_write.cc"), ("matmul.cc",))
TIMEOUT_S = 300


class UnavailableError(Exception):
    """The library cannot be had on this machine; the text says why, and what would help."""


def build() -> Path:
    """The library's path; compiles it unless the cache has it. `UnavailableError` where that fails."""
    compiler = _compiler()
    path = cache_folder() / f"cpu-{_digest(compiler)}.so"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(path.with_suffix(".lock")):  # replicas that start together: one compiles, the others wait
                if not path.exists():
                    _compile(compiler, path)
        except OSError as error:
            raise UnavailableError(f"the cache folder {path.parent} cannot be written: {error}") from error
    return path


def source_digest() -> str:
    """Changes with the sources, so that no compiled program calls kernels other than those it was compiled for."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Where libraries are kept: within `JAXSERVE_CACHE_DIR`, or the user's cache folder."""
    configured = os.environ.get("JAXSERVE_CACHE_DIR")
    root = Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("jaxserve"))
    return root / "native"


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return found
    where = f"CXX names {asked!r}, which is not to be found" if asked else "no C++ compiler is installed"
    raise UnavailableError(f"{where}; install one (Debian: apt install g++) for the fast CPU kernels")


def _digest(compiler: str) -> str:
    """Of all that the library depends on; -march=native makes the processor's features one of these."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    facts = (source_digest(), FLAGS, UNITS, compiler, version.stdout, jaxlib_version, processor())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def processor() -> str:
    """What this processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compiler: str, path: Path) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # other processes see all of the library, or none
        built = Path(folder) / path.name
        includes = ("-isystem", jax.ffi.include_dir(), "-x", "c++")
        commands, objects = [], []
        for number in range(len(UNITS)):
            objects.append(str(Path(folder) / f"{number}.o"))
            commands.append([compiler, *FLAGS, *includes, "-c", "-", "-o", objects[-1]])
        with ThreadPoolExecutor(len(UNITS)) as pool:  # each is a process's work on a core of its own
            list(pool.map(_run, commands, map(_source_of, UNITS)))
        _run([compiler, *FLAGS, "-shared", *objects, "-o", str(built)])
        built.replace(path)
    logger.info("compiled the CPU kernels with %s in %.1f s: %s", compiler, time.perf_counter() - start, path)


def _source_of(unit: tuple[str, ...]) -> str:
    return "".join(f'#include "{SOURCES / name}"\n' for name in unit)


def _run(command: list[str], source: str = "") -> None:
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise UnavailableError(f"{command[0]} could not compile the CPU kernels: {(errors or ['no message'])[0]}")
