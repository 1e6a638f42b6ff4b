"""Which class serves which `architectures` entry of config.json."""

from __future__ import annotations

import difflib

from jaxserve.errors import CheckpointError
from jaxserve.models.base import CausalLM
from jaxserve.models.eagle3 import Eagle3
from jaxserve.models.head import DraftHead
from jaxserve.models.llama import Llama
from jaxserve.models.mimo import MiMo, MiMoMTP

_FAMILIES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Llama,
    "MiMoForCausalLM": MiMo,
}

HEADS: dict[str, type[DraftHead]] = {"eagle3": Eagle3, "mtp": MiMoMTP}  # by speculative_config's method


def family(architecture: str) -> type[CausalLM]:
    """The model class for an architecture name; `CheckpointError` lists the known ones."""
    if architecture not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        near = difflib.get_close_matches(architecture, _FAMILIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(f"config.json: architecture {architecture!r} is not supported{hint} (known: {known})")
    return _FAMILIES[architecture]
