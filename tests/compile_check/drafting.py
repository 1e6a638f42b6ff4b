"""What drafts for a model: a draft model's programs and draft heads', as the engine would compile them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.stages import Lowered

from jaxserve.config import config_from_values
from jaxserve.models.base import DecoderConfig
from jaxserve.plan import deployment as planned
from jaxserve.plan.devices import Devices
from jaxserve.plan.models import known_config
from jaxserve.runner.buckets import Bucket, Buckets
from jaxserve.runner.head_programs import HeadPrograms
from jaxserve.runner.programs import Programs
from jaxserve.sampling.inputs import Variant
from tests.compile_check.jobs import Job
from tests.compile_check.kernels import IMPLEMENTATION
from tests.compile_check.steps import DEPLOYMENTS, ITEM_BYTES, REDUCED_LAYERS, Deployment
from tests.compile_check.targets import DEVICES

NUM_DRAFTS = 5  # a row
Lower = Callable[[Any, Bucket], Lowered]

_8B = known_config("meta-llama/Llama-3.1-8B-Instruct")
_1B = _8B | {  # Llama 3.2 1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "rope_scaling": _8B["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_EAGLE3 = _8B | {  # as published for Llama 3.1 8B
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 32000,
    "eagle_aux_hidden_state_layer_ids": [0, 1, 2],  # of models that are reduced to two layers
}
_MIMO = {  # MiMo 7B
    "architectures": ["MiMoForCausalLM"],
    "model_type": "mimo",
    "attention_bias": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640000,
    "tie_word_embeddings": False,
    "vocab_size": 151680,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """A model on some devices, and what drafts for it there."""

    deployment: Deployment
    what: str  # drafts
    method: str
    num_layers: int  # at most, of the two
    drafter: dict[str, Any] | None = None  # its config.json; None: it is in the model's own checkpoint

    def programs(self, whose: int, mesh: Mesh) -> tuple[Any, Buckets]:
        """The engine's own: of the model (0) or of what drafts (1), and the steps that they are compiled for.

        Pools have as many blocks as without drafts, more than would fit, as nothing is allocated.
        """
        model = self.deployment
        with tempfile.TemporaryDirectory() as folder:
            config = config_from_values(
                {
                    "model": self._written(Path(folder, "model"), model.hf_config),
                    "dtype": "bfloat16",
                    "max_model_len": model.max_model_len,
                    "max_num_seqs": model.max_num_seqs,
                    "max_num_batched_tokens": model.max_num_batched_tokens,
                    "tensor_parallel_size": model.target.tensor_size,
                    "attention_backend": IMPLEMENTATION[model.target.platform],
                    "speculative_config": {
                        "method": self.method,
                        "num_speculative_tokens": NUM_DRAFTS,
                        "model": self.drafter and self._written(Path(folder, "drafter"), self.drafter),
                    },
                }
            )
            devices = Devices(kind=DEVICES[model.target.device], count=model.target.num_devices)
            plan = planned.Deployment.of(config, devices, mesh=mesh)
        shapes = plan.shapes(num_blocks=model.num_blocks, max_model_len=model.max_model_len)
        return plan.models[whose].programs(shapes), plan.buckets

    def _written(self, folder: Path, hf_config: dict[str, Any]) -> str:
        folder.mkdir()
        layers = min(hf_config["num_hidden_layers"], self.num_layers)
        (folder / "config.json").write_text(json.dumps(hf_config | {"num_hidden_layers": layers}))
        return str(folder)

    def pass_job(
        self, name: str, hf_config: dict[str, Any], num_tokens: int, lower: Lower, *, whose: int = 1, states: int = 0
    ) -> Job:
        """Of a pass over a step's tokens by a decoder of these sizes, which writes so many states in place, too."""
        decoder = DecoderConfig.from_hf(hf_config)
        layers = min(decoder.num_layers, self.num_layers)
        limits = self.deployment.pass_limits(decoder, layers, num_tokens)
        state_bytes = states * decoder.hidden_size * ITEM_BYTES
        return Job(
            name=f"{self.deployment.name}, {self.what}, {name} of {num_tokens}",
            target=self.deployment.target,
            lower=partial(_lower_pass, self, whose, lower, num_tokens),
            limits=replace(limits, min_alias_bytes=limits.min_alias_bytes + state_bytes),
            layers=layers,
        )

    def head_jobs(self, hf_config: dict[str, Any], *, decode: int, largest: int) -> list[Job]:
        """Of a head's two passes, which keep the states of each slot's last positions."""
        states = (self.deployment.max_num_seqs + 1) * (NUM_DRAFTS + 1)
        return [
            self.pass_job("following a step", hf_config, largest, HeadPrograms.lower_forward, states=states),
            self.pass_job("advancing by a step", hf_config, decode, HeadPrograms.lower_advance, states=states),
        ]

    def draw_job(self, variant: Variant, *, num_more_collectives: int = 0) -> Job:
        """Of drawing a draft of each row."""
        return Job(
            name=f"{self.deployment.name}, {self.what}, drawing {variant!r}",
            target=self.deployment.target,
            lower=partial(_lower_draw, self, variant),
            limits=self.deployment.sampler_limits(variant, num_more_collectives=num_more_collectives),
            has_kernels=False,
        )


def drafting_jobs(*, full: bool) -> list[Job]:
    """For an 8B on each kind of device: the programs of a draft model of 1B, of an EAGLE-3 head, and of MiMo's head."""
    jobs = []
    for model in DEPLOYMENTS:
        if model.hf_config != _8B or model.target.num_data_shards > 1:
            continue
        of = partial(Drafting, deployment=model, num_layers=1000 if full else REDUCED_LAYERS)
        decode, largest = model.buckets.pick(model.max_num_seqs).num_tokens, model.buckets.token_sizes[-1]
        smaller = of(what="draft model of 1B", method="draft_model", drafter=_1B)
        eagle3 = of(what="EAGLE-3 head", method="eagle3", drafter=_EAGLE3)
        mimo = of(deployment=replace(model, name="MiMo 7B", hf_config=_MIMO), what="its head", method="mtp")
        mimo_head = _MIMO | {"num_hidden_layers": 1}
        jobs += [
            smaller.pass_job("decode step", _1B, decode, Programs.lower_forward),
            smaller.draw_job("random"),
            eagle3.pass_job("the model's decode step", _8B, decode, Programs.lower_forward, whose=0),
            *eagle3.head_jobs(_EAGLE3, decode=decode, largest=largest),
            # The logits of its own vocabulary come together before they take the places of the model's tokens.
            eagle3.draw_job("full", num_more_collectives=1),
            *mimo.head_jobs(mimo_head, decode=decode, largest=largest),
            mimo.draw_job("greedy"),
        ]
    return jobs


def _lower_pass(drafting: Drafting, whose: int, lower: Lower, num_tokens: int, mesh: Mesh) -> Lowered:
    programs, buckets = drafting.programs(whose, mesh)
    return lower(programs, buckets.pick(num_tokens))


def _lower_draw(drafting: Drafting, variant: Variant, mesh: Mesh) -> Lowered:
    programs, buckets = drafting.programs(1, mesh)
    return programs.lower_sample(buckets.row_sizes[-1], variant)
