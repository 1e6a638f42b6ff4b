"""The runner's own programs, sharded: Llama-3.1-8B and Llama-3.3-70B as the launch files run them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Lowered

from jaxserve.cache.kv_cache import KVCacheSpec
from jaxserve.engine.device import DeviceDefaults
from jaxserve.models.base import DecoderConfig
from jaxserve.plan.deployment import SAMPLER_COLLECTIVES
from jaxserve.plan.memory import activation_bytes
from jaxserve.plan.models import known_config
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.runner.programs import Programs
from jaxserve.runner.step import PROMPT_LOGPROB_ROWS
from jaxserve.sampling.inputs import VARIANTS, Variant
from tests.compile_check.jobs import Job, Limits
from tests.compile_check.kernels import IMPLEMENTATION
from tests.compile_check.targets import Target

ITEM_BYTES = jnp.dtype(jnp.bfloat16).itemsize
# Of the scores of known tokens, where the vocabulary is split: its largest, its mass, the token's logit, those above
# it, and the best few.
PROMPT_COLLECTIVES = 5
REDUCED_LAYERS = 2  # all layers are alike: two show what a layer costs, and what lies between two

_8B = known_config("meta-llama/Llama-3.1-8B-Instruct")
_70B = known_config("meta-llama/Llama-3.3-70B-Instruct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on some devices, with the sizes that the launch files in configs/ give it."""

    name: str
    hf_config: dict[str, Any]
    target: Target
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def decoder(self) -> DecoderConfig:
        """The model's sizes."""
        return DecoderConfig.from_hf(self.hf_config)

    @property
    def block_size(self) -> int:
        """Tokens a block, as the engine chooses them for the device."""
        return DeviceDefaults.of({"cuda": "gpu"}.get(self.target.platform, self.target.platform)).block_size

    @property
    def buckets(self) -> Buckets:
        """The step sizes that the engine would compile."""
        return Buckets.plan(max_num_batched_tokens=self.max_num_batched_tokens, max_num_seqs=self.max_num_seqs)

    def kv_spec(self, num_layers: int) -> KVCacheSpec:
        """The cache of so many layers."""
        decoder = self.decoder
        return KVCacheSpec(
            num_layers=num_layers,
            num_kv_heads=decoder.num_kv_heads,
            head_dim=decoder.head_dim,
            block_size=self.block_size,
            dtype=jnp.bfloat16,
            implementation=IMPLEMENTATION[self.target.platform],
            num_shards=self.target.tensor_size,
        )

    @property
    def num_blocks(self) -> int:
        """Blocks of a full-sized model's pool: four fifths of what its weights leave of a data shard's devices.

        Odd, and no multiple of anything else in the step, so that only pools have the size of a pool.
        """
        decoder = self.decoder
        attention = 2 * decoder.hidden_size * (decoder.num_q_heads + decoder.num_kv_heads) * decoder.head_dim
        layer = attention + 3 * decoder.hidden_size * decoder.ffn_size
        weight_bytes = 2 * (decoder.num_layers * layer + 2 * decoder.vocab_size * decoder.hidden_size)
        free = self.target.memory_bytes * self.target.tensor_size - weight_bytes
        return self.kv_spec(decoder.num_layers).num_blocks_in(int(free * 0.8)) // 2 * 2 - 1

    def pass_limits(self, decoder: DecoderConfig, num_layers: int, num_tokens: int) -> Limits:
        """Of a pass over so many layers: of the model, or of what drafts for it in pools of the same blocks."""
        num_devices = self.target.tensor_size
        token_bytes = decoder.num_kv_heads * decoder.head_dim * ITEM_BYTES // num_devices  # K's, a device
        pool_bytes = self.num_blocks * self.block_size * token_bytes
        activations = activation_bytes(replace(decoder, num_shards=num_devices), num_tokens, ITEM_BYTES)
        return Limits(
            pool_elements=pool_bytes // ITEM_BYTES,
            min_alias_bytes=2 * num_layers * pool_bytes,
            max_temp_bytes=activations + (64 << 20),
            vocab_size=decoder.vocab_size,
            num_shards=num_devices,
            # The embedding's, and of each layer the attention's and the feed-forward's sum over devices.
            max_collectives=2 * num_layers + 1 if num_devices > 1 else 0,
        )

    def small_limits(self) -> dict[str, Limits]:
        """Of the small programs around a step, by name; tables are written where they lie."""
        tokens = 4 * (self.max_num_seqs + 1) * self.max_model_len  # bytes, as all here
        tables = tokens // self.block_size
        num_devices = self.target.tensor_size
        logits = 4 * PROMPT_LOGPROB_ROWS * self.decoder.vocab_size // num_devices
        return {
            "take_rows": Limits(max_temp_bytes=PROMPT_LOGPROB_ROWS * self.decoder.hidden_size * ITEM_BYTES),
            "score_prompt": Limits(
                max_temp_bytes=2 * logits,
                vocab_size=self.decoder.vocab_size,
                num_shards=num_devices,
                max_collectives=PROMPT_COLLECTIVES if num_devices > 1 else 0,
            ),
            "write_slot": Limits(min_alias_bytes=tokens + tables, max_temp_bytes=tokens),
            "write_blocks": Limits(min_alias_bytes=tables, max_temp_bytes=tables),
            "write_drafts": Limits(min_alias_bytes=tokens, max_temp_bytes=tables),
        }

    def sampler_limits(self, variant: Variant, *, num_more_collectives: int = 0) -> Limits:
        """Of the head and the sampler."""
        num_devices = self.target.tensor_size
        return Limits(
            vocab_size=self.decoder.vocab_size,
            num_shards=num_devices,
            max_collectives=SAMPLER_COLLECTIVES[variant] + num_more_collectives if num_devices > 1 else 0,
        )


DEPLOYMENTS = (
    Deployment(
        name="Llama 3.1 8B",
        hf_config=_8B,
        target=Target(device="h100", num_devices=1),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=32768,
    ),
    Deployment(
        name="Llama 3.3 70B",
        hf_config=_70B,
        target=Target(device="h100", num_devices=4),
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        max_model_len=16384,
    ),
    Deployment(
        name="Llama 3.3 70B",
        hf_config=_70B,
        target=Target(device="h100", num_devices=8),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_model_len=32768,
    ),
    Deployment(
        name="Llama 3.1 8B",
        hf_config=_8B,
        target=Target(device="v5e", num_devices=4),
        max_num_seqs=96,
        max_num_batched_tokens=2048,
        max_model_len=8192,
    ),
    Deployment(
        name="Llama 3.1 8B",
        hf_config=_8B,
        target=Target(device="v6e", num_devices=4),
        max_num_seqs=192,
        max_num_batched_tokens=2048,
        max_model_len=16384,
    ),
    Deployment(
        name="Llama 3.3 70B",
        hf_config=_70B,
        target=Target(device="v6e", num_devices=8),
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        max_model_len=8192,
    ),
    Deployment(
        name="Llama 3.1 8B",
        hf_config=_8B,
        target=Target(device="h100", num_devices=4, num_data_shards=2),
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        max_model_len=16384,
    ),
    Deployment(
        name="Llama 3.1 8B",
        hf_config=_8B,
        target=Target(device="v5e", num_devices=8, num_data_shards=2),
        max_num_seqs=96,
        max_num_batched_tokens=2048,
        max_model_len=8192,
    ),
)


def step_jobs(*, full: bool) -> list[Job]:
    """Of each deployment: the forward programs of a decode step and of the largest step, and every sampler."""
    jobs = []
    for deployment in DEPLOYMENTS:
        buckets = deployment.buckets
        sizes = {"decode": buckets.pick(deployment.max_num_seqs).num_tokens, "largest": buckets.token_sizes[-1]}
        for name, num_tokens in sizes.items():
            jobs.append(_forward_job(deployment, f"{name} step of {num_tokens}", num_tokens, full=full))
        jobs += [_sample_job(deployment, variant) for variant in VARIANTS]
        if deployment.hf_config == _8B and deployment.target.name in ("h100", "v5e-4"):  # no model makes them differ
            jobs += [_small_job(deployment, name, limits) for name, limits in deployment.small_limits().items()]
    return jobs


def _forward_job(deployment: Deployment, name: str, num_tokens: int, *, full: bool) -> Job:
    layers = deployment.decoder.num_layers if full else REDUCED_LAYERS
    return Job(
        name=f"{deployment.name}, {name}",
        target=deployment.target,
        lower=partial(_lower_forward, deployment, layers, num_tokens),
        limits=deployment.pass_limits(deployment.decoder, layers, num_tokens),
        layers=layers,
    )


def _sample_job(deployment: Deployment, variant: Variant) -> Job:
    return Job(
        name=f"{deployment.name}, sampler {variant!r}",
        target=deployment.target,
        lower=partial(_lower_sample, deployment, variant),
        limits=deployment.sampler_limits(variant),
        has_kernels=False,
    )


def _small_job(deployment: Deployment, name: str, limits: Limits) -> Job:
    return Job(
        name=f"{deployment.name}, {name}",
        target=deployment.target,
        lower=partial(_lower_small, deployment, name),
        limits=limits,
        has_kernels=False,
    )


def _programs(deployment: Deployment, num_layers: int, mesh: Mesh) -> Programs:
    decoder = replace(deployment.decoder, num_layers=num_layers)
    backend = choose_backend(
        decoder,
        dtype=jnp.bfloat16,
        block_size=deployment.block_size,
        mesh=mesh,
        asked="mosaic_gpu" if deployment.target.platform == "cuda" else "mosaic_tpu",
    )
    shapes = ProgramShapes(
        buckets=deployment.buckets,
        kv_spec=deployment.kv_spec(num_layers),
        num_blocks=deployment.num_blocks,
        max_num_seqs=deployment.max_num_seqs,
        max_model_len=deployment.max_model_len,
        max_num_drafts=deployment.max_num_seqs,
    )
    return Programs(ModelGraph(decoder, dtype=jnp.bfloat16, backend=backend), shapes)


def _lower_forward(deployment: Deployment, num_layers: int, num_tokens: int, mesh: Mesh) -> Lowered:
    programs = _programs(deployment, num_layers, mesh)
    return programs.lower_forward(deployment.buckets.pick(num_tokens))


def _lower_sample(deployment: Deployment, variant: Variant, mesh: Mesh) -> Lowered:
    programs = _programs(deployment, 1, mesh)
    return programs.lower_sample(deployment.buckets.row_sizes[-1], variant)


def _lower_small(deployment: Deployment, name: str, mesh: Mesh) -> Lowered:
    sizes = deployment.buckets.token_sizes[-1:] if name == "take_rows" else ()
    return _programs(deployment, 1, mesh).lower_small(name, *sizes)
