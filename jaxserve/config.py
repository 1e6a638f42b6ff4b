"""`Config`: every setting of jaxserve as one frozen, typed tree; launch files, flags and `LLM(...)` all fill it in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from jaxserve.config_deploy import DeploySettings
from jaxserve.config_file import read_launch_file, unknown_setting
from jaxserve.config_parallel import ParallelSettings, check_parallel
from jaxserve.config_speculative import SpeculativeSettings, check_spread
from jaxserve.config_values import Bytes, Count, Integers, JsonObject, Settings, Strings, describe_errors
from jaxserve.errors import ConfigError

API_KEY_VARIABLE = "JAXSERVE_API_KEY"
REDACTED = "***"


class ModelSettings(Settings):
    """Which model, and how its files are read."""

    model: str = Field(min_length=1, description="Folder, .gguf file, hub id, or package:name/file of the model.")
    tokenizer: str | None = Field(default=None, description="Where the tokenizer is, if not with the model.")
    served_model_name: Strings = Field(
        default=(), description="Names clients may use; replies carry the first. [the model]"
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and activations; auto is the checkpoint's own."
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        default="auto", description="How weights are read; dummy makes random ones, for benchmarks."
    )
    max_model_len: Count | None = Field(
        default=None, ge=2, description="Tokens of prompt and answer, as 8192, 8k or 8K. [the model's context]"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of dummy weights and of requests without their own.")
    chat_template: str | None = Field(
        default=None, description="File with a Jinja chat template, instead of the model's."
    )
    hf_overrides: JsonObject = Field(default={}, description="Deep-merged into the model's config.json.")
    generation_config: Literal["auto", "vllm"] = Field(
        default="auto", description="Sampling defaults: auto reads generation_config.json, vllm ignores it."
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        """The names clients may use, never empty."""
        return self.served_model_name or (self.model,)


class CacheSettings(Settings):
    """The KV pool."""

    block_size: int | None = Field(
        default=None, ge=1, le=1024, description="Tokens a block, a power of two. [by device]"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of device memory to use, in (0, 1]."
    )
    kv_cache_memory_bytes: Bytes | None = Field(
        default=None, description="KV pool size a device, such as 2GiB; instead of gpu_memory_utilization."
    )
    num_gpu_blocks_override: int | None = Field(
        default=None, ge=2, description="Blocks in a model copy's pool, one of them reserved."
    )
    enable_prefix_caching: bool = Field(default=True, description="Share the blocks of equal prompt beginnings.")


class SchedulerSettings(Settings):
    """Who runs when."""

    max_num_batched_tokens: Count | None = Field(
        default=None, description="Tokens a step, over all requests of a model copy. [by device]"
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="Requests a model copy runs at once. [by device]")
    scheduling_policy: Literal["fcfs", "priority"] = Field(
        default="fcfs", description="fcfs: first come, first served; priority: lowest number first."
    )
    max_queued_requests: int = Field(default=1024, ge=1, description="Requests that may wait; more get HTTP 429.")
    async_scheduling: bool = Field(default=True, description="Plan the next step while the device computes this one.")
    enable_chunked_prefill: bool = Field(
        default=True, description="Prompts are always computed in chunks; for command lines that say so."
    )
    long_prefill_token_threshold: int = Field(
        default=0, ge=0, description="Most prompt tokens a request a step; 0: no limit."
    )


class RuntimeSettings(Settings):
    """Devices, kernels and compilation."""

    device: Literal["auto", "cpu", "cuda", "tpu"] = Field(default="auto", description="Where the model runs.")
    attention_backend: Literal["auto", "xla", "mosaic_gpu", "mosaic_tpu", "native_cpu"] = Field(
        default="auto", description="Attention kernels; auto takes the best that runs on the device."
    )
    compilation_cache_dir: str | None = Field(
        default=None, description="Folder of compiled programs. [the user's cache folder]"
    )
    compile_threads: int | None = Field(
        default=None, ge=1, description="Programs compiled at once. [one a core, at most 8]"
    )
    token_buckets: Integers | None = Field(
        default=None, description="Padded step sizes in tokens, ascending. [by device]"
    )


class ServerSettings(Settings):
    """The HTTP server."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 is every interface."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    api_key: Strings = Field(default=(), repr=False, description=f"Keys clients must send; also {API_KEY_VARIABLE}.")
    allowed_origins: Strings = Field(default=(), description="Origins that browsers may call from (CORS); * is any.")
    root_path: str = Field(
        default="", pattern=r"^(/.*[^/])?$", description="Path prefix under which a proxy serves this."
    )
    max_body_bytes: Bytes = Field(default=16 * 1024**2, description="Largest request body, such as 16MiB.")
    body_timeout_s: float = Field(default=30.0, gt=0, description="Seconds to send a request's body in, or HTTP 408.")
    shutdown_timeout_s: float = Field(default=30.0, ge=0, description="Seconds that running requests get to finish.")
    metrics_prefix: str = Field(
        default="jaxserve:", pattern=r"^([a-zA-Z_:][a-zA-Z0-9_:]*)?$", description="Before metric names."
    )
    enable_log_requests: bool = Field(
        default=False, description="Log each request's sizes and parameters, not its text."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe lines to log."
    )
    max_num_engine_restarts: int = Field(default=3, ge=0, description="Times a dead engine is started again.")


class Config(Settings):
    """The whole tree. `load_config` makes one; an instance is always checked, and never changes."""

    model: ModelSettings
    cache: CacheSettings = CacheSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    speculative: SpeculativeSettings = SpeculativeSettings()
    parallel: ParallelSettings = ParallelSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    server: ServerSettings = ServerSettings()
    deploy: DeploySettings = DeploySettings()

    @model_validator(mode="after")
    def _check(self) -> Config:
        """Check what fields say together; raises `ConfigError`."""
        _check_model(self.model)
        _check_cache(self.cache)
        _check_steps(self)
        check_parallel(self.parallel)
        check_spread(self.speculative, self.parallel.tensor_parallel_size)
        _check_runtime(self.runtime)
        if not all(key.strip() for key in self.server.api_key):
            raise ConfigError("api_key must not be empty: leave it out to serve without a key")
        return self

    def with_values(self, **values: Any) -> Config:
        """A new tree with some settings changed, by their flat names.

        >>> config_from_values({"model": "m"}).with_values(port=80).server.port
        80
        """
        flat = {name: getattr(getattr(self, f.section), name) for name, f in FIELDS.items()}
        return config_from_values(flat | values)

    def redacted(self) -> dict[str, dict[str, Any]]:
        """The tree as plain data for people to read: API keys are replaced."""
        data = self.model_dump(mode="json")
        data["server"]["api_key"] = [REDACTED] * len(self.server.api_key)
        return data

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of a launch file: sections, and every setting flat as well."""
        schema = cls.model_json_schema()
        sections = schema["properties"]
        flat = {name: schema["$defs"][f.section_class.__name__]["properties"][name] for name, f in FIELDS.items()}
        both = {name: {"anyOf": [flat[name], sections[name]]} for name in flat.keys() & sections.keys()}
        schema["properties"] = flat | sections | both
        del schema["required"]  # `model` may come from a flag
        return schema


@dataclass(frozen=True, slots=True)
class ConfigField:
    """A leaf of the tree: what a flag or a file's key is made from."""

    name: str
    section: str
    section_class: type[BaseModel]
    info: FieldInfo


def _collect_fields() -> dict[str, ConfigField]:
    fields: dict[str, ConfigField] = {}
    for section, section_info in Config.model_fields.items():
        section_class = section_info.annotation
        assert isinstance(section_class, type) and issubclass(section_class, BaseModel)
        for name, info in section_class.model_fields.items():
            assert name not in fields, f"{name} is in two sections; a flat name must mean one setting"
            fields[name] = ConfigField(name, section, section_class, info)
    return fields


FIELDS = _collect_fields()  # flat name -> leaf, in the tree's order
SECTIONS = {section: [f.name for f in FIELDS.values() if f.section == section] for section in Config.model_fields}


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Make the config from a launch file (YAML, by sections or flat), the environment, and flat overrides.

    Overrides win over the environment's API key, that over the file, the file over defaults. Nothing is expanded: no
    `~`, no variables. Raises `ConfigError` in one line that names what is wrong, and where.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    if path is not None:
        for entry in read_launch_file(Path(path), SECTIONS):
            values[entry.name], places[entry.name] = entry.value, entry.place
    if key := (os.environ if environ is None else environ).get(API_KEY_VARIABLE):
        values["api_key"], places["api_key"] = key, f"the environment variable {API_KEY_VARIABLE}"
    for name, value in (overrides or {}).items():
        flat_name = name.replace("-", "_")
        if flat_name not in FIELDS:
            raise unknown_setting(name, FIELDS)
        values[flat_name] = value
        places.pop(flat_name, None)
    return config_from_values(values, places)


def config_from_values(values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Config:
    """Build the tree from flat values; `places` says where a value was written, for error messages."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    for name, value in values.items():
        tree[FIELDS[name].section][name] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, places or {}, FIELDS)) from None


def _check_model(model: ModelSettings) -> None:
    is_gguf = model.model.endswith(".gguf")
    if model.load_format == ("safetensors" if is_gguf else "gguf"):
        kind = "a GGUF file" if is_gguf else "no .gguf file"
        raise ConfigError(f"load_format is {model.load_format!r}, but model {model.model!r} is {kind}; leave it out")
    names = model.served_model_name
    if len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"served_model_name must hold different, non-empty names, got {list(names)}")


def _check_cache(cache: CacheSettings) -> None:
    if cache.block_size is not None and cache.block_size & (cache.block_size - 1):
        raise ConfigError(f"block_size must be a power of two, got {cache.block_size}")
    if cache.kv_cache_memory_bytes is not None and cache.num_gpu_blocks_override is not None:
        raise ConfigError("kv_cache_memory_bytes and num_gpu_blocks_override both size the KV pool; give one of them")


def _check_steps(config: Config) -> None:
    scheduler, buckets = config.scheduler, config.runtime.token_buckets
    budget = scheduler.max_num_batched_tokens
    if budget is not None and scheduler.max_num_seqs is not None and budget < scheduler.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({budget}) must be at least max_num_seqs ({scheduler.max_num_seqs}): "
            "each running request takes one token a step"
        )
    if not scheduler.enable_chunked_prefill:
        raise ConfigError(
            "enable_chunked_prefill cannot be off: prompts are always computed in chunks of what a step has room for; "
            "leave it out, and raise max_num_batched_tokens for larger ones"
        )
    if buckets is None:
        return
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in zip(buckets, buckets[1:], strict=False)):
        raise ConfigError(f"token_buckets must be positive and ascending, got {list(buckets)}")
    if budget is not None and buckets[-1] < budget:
        raise ConfigError(f"the largest of token_buckets ({buckets[-1]}) must reach max_num_batched_tokens ({budget})")


def _check_runtime(runtime: RuntimeSettings) -> None:
    needed = {"mosaic_gpu": "cuda", "mosaic_tpu": "tpu", "native_cpu": "cpu"}.get(runtime.attention_backend)
    if needed is not None and runtime.device not in ("auto", needed):
        raise ConfigError(
            f"attention_backend {runtime.attention_backend!r} needs device {needed!r}, got {runtime.device!r}"
        )
