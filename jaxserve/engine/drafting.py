"""What `speculative_config` brings into an engine: its drafter, room for drafts, and the model that draws them."""

from __future__ import annotations

from jaxserve.config import Config, ModelSettings
from jaxserve.config_speculative import SpeculativeConfig
from jaxserve.engine.assembly import ModelParts
from jaxserve.errors import ConfigError
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.loading import ModelFiles, open_model
from jaxserve.runner.model_graph import ModelGraph, choose_backend
from jaxserve.scheduler.draft_planner import Drafter
from jaxserve.speculative.draft_model import DraftModelProposer
from jaxserve.speculative.drafter import SpeculativeDrafter
from jaxserve.speculative.ngram import NgramProposer
from jaxserve.speculative.proposer import Proposer


def max_num_drafts(speculative: SpeculativeConfig | None, max_num_seqs: int) -> int:
    """Draft tokens a step: one a row where all run, the limit of each where few do; at most twice the logits."""
    return 0 if speculative is None else max(max_num_seqs, speculative.num_speculative_tokens)


def make_drafter(speculative: SpeculativeConfig | None, buckets: Buckets) -> Drafter | None:
    """The scheduler's drafter, if there is to be one."""
    if speculative is None:
        return None
    return SpeculativeDrafter(
        _proposer(speculative),
        max_tokens=speculative.num_speculative_tokens,
        step_sizes=buckets.token_sizes,
        is_adaptive=speculative.adaptive,
    )


def open_draft_models(config: Config, target: ModelParts, *, max_model_len: int) -> tuple[ModelParts, ...]:
    """The draft model, where the config names one; `ConfigError` where it cannot draft for `target`."""
    speculative = config.speculative.speculative_config
    if speculative is None or speculative.model is None:
        return ()
    settings = ModelSettings(
        model=speculative.model,
        dtype=config.model.dtype,
        load_format="dummy" if config.model.load_format == "dummy" else "auto",
        seed=config.model.seed,
    )
    files = open_model(settings)
    _check_fits(speculative.model, files, target.files, max_model_len)
    asked = config.runtime.attention_backend
    try:
        backend = choose_backend(
            files.decoder,
            dtype=files.dtype,
            block_size=target.graph.backend.geometry.block_size,
            mesh=target.graph.mesh,
            asked=None if asked == "auto" else asked,
        )
    except ConfigError as error:
        raise ConfigError(f"draft model {speculative.model!r}: {error}") from error
    return (ModelParts(files, ModelGraph(files.decoder, dtype=files.dtype, backend=backend)),)


def _proposer(speculative: SpeculativeConfig) -> Proposer:
    if speculative.method == "draft_model":
        return DraftModelProposer()
    return NgramProposer(min_tokens=speculative.prompt_lookup_min, max_tokens=speculative.prompt_lookup_max)


def _check_fits(name: str, draft: ModelFiles, target: ModelFiles, max_model_len: int) -> None:
    if draft.decoder.vocab_size != target.decoder.vocab_size:
        raise ConfigError(
            f"draft model {name!r} has a vocabulary of {draft.decoder.vocab_size} tokens, the model has "
            f"{target.decoder.vocab_size}; a draft model must share the model's tokenizer"
        )
    if draft.decoder.max_position_embeddings < max_model_len:
        raise ConfigError(
            f"draft model {name!r} takes {draft.decoder.max_position_embeddings} tokens, max_model_len is "
            f"{max_model_len}; set max_model_len to what both take"
        )
