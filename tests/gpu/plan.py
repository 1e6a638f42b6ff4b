"""The stages of a run, in order, and how its 8 minutes are dealt out."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_S = 480.0  # of a whole run


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One process with a list of works. What a stage leaves of its share, the later ones may use."""

    name: str
    title: str
    share_s: float  # of TOTAL_S
    silence_s: float  # that one work may take, its compilation and the start of the process included
    is_peer: bool = False  # of another framework, which may be missing, and which JAX must leave the device to

    @property
    def module(self) -> str:
        """Where its `works` and `prepare` are."""
        return f"tests.gpu.{self.name}"


# Seen on an H100 with 16 cores, nothing in the compile cache (2026-11-26, JAX 0.11.2): correctness 102 and 130 s with
# 60 programs, engine_tokens 46 s with four engines of five, prefill_attention 21 s, throughput 58 s, decode_attention
# 55 s without the wait for its compilers. The others are expected. A second run finds the programs in the compile
# cache: decode_step then takes 20 s.
_STAGES = (
    Stage(name="device", title="device", share_s=5, silence_s=20),
    Stage(name="correctness", title="kernels against their oracle", share_s=143, silence_s=80),
    Stage(name="engine_tokens", title="the engine's greedy tokens", share_s=70, silence_s=75),
    Stage(name="decode_attention", title="decode attention", share_s=57, silence_s=45),
    Stage(name="prefill_attention", title="prefill attention", share_s=23, silence_s=35),
    Stage(name="torch_attention", title="PyTorch's attention", share_s=21, silence_s=20, is_peer=True),
    Stage(name="decode_step", title="decode step", share_s=53, silence_s=75),
    Stage(name="throughput", title="throughput", share_s=61, silence_s=110),
    Stage(
        name="transformers_batching", title="transformers' continuous batching", share_s=47, silence_s=75, is_peer=True
    ),
)
STAGES = {stage.name: stage for stage in _STAGES}
