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


# Expected on an H100 with 16 cores, nothing in the compile cache. Compile times are those of docs/compile-check.md (two
# busy cores) over four, since a server's cores are faster and idle; each stage compiles its programs side by side.
#   device                  10 s   start of JAX
#   correctness             60 s   60 programs of 1 to 5 s, lowered one at a time (0.5 s each), compiled in 12 threads
#   engine_tokens           60 s   4 engines: programs of 3 and 4 layers, the samplers (12 s), 12 prompts of 48 tokens
#   decode_attention        35 s   24 programs of 3 s in threads; milliseconds of work
#   prefill_attention       25 s   3 programs of 6 s
#   torch_attention         20 s   start of PyTorch, nothing to compile
#   decode_step             70 s   6 forwards of 32 layers (20 to 30 s) side by side, weights made on the device in 5 s
#   throughput              95 s   weights (30 s) and compilation (40 s) side by side, then 35 s of work
#   transformers_batching   45 s   start, 10 s; prefills and CUDA graphs, 10 s; 25 s of decoding
# Together 420 s. A second run finds the programs in the compile cache.
_STAGES = (
    Stage(name="device", title="device", share_s=20, silence_s=20),
    Stage(name="correctness", title="kernels against their oracle", share_s=80, silence_s=50),
    Stage(name="engine_tokens", title="the engine's greedy tokens", share_s=80, silence_s=60),
    Stage(name="decode_attention", title="decode attention", share_s=45, silence_s=45),
    Stage(name="prefill_attention", title="prefill attention", share_s=35, silence_s=35),
    Stage(name="torch_attention", title="PyTorch's attention", share_s=25, silence_s=20, is_peer=True),
    Stage(name="decode_step", title="decode step", share_s=75, silence_s=75),
    Stage(name="throughput", title="throughput", share_s=80, silence_s=110),
    Stage(
        name="transformers_batching", title="transformers' continuous batching", share_s=40, silence_s=75, is_peer=True
    ),
)
STAGES = {stage.name: stage for stage in _STAGES}
