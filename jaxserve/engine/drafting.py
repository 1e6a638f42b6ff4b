"""What `speculative_config` brings into an engine: its drafter, room for drafts, and what draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.cache.kv_cache import LayerCache
from jaxserve.config import Config, ModelSettings
from jaxserve.config_speculative import HEAD_METHODS, SpeculativeConfig
from jaxserve.engine.assembly import Loaded, ModelParts
from jaxserve.errors import ConfigError
from jaxserve.layers.attention import AttentionBackend
from jaxserve.runner.buckets import Buckets
from jaxserve.runner.grammars import SlotGrammars
from jaxserve.runner.head_loading import HeadFiles, open_head
from jaxserve.runner.head_programs import HeadPrograms, LoadedHead
from jaxserve.runner.loading import ModelFiles, open_model
from jaxserve.runner.model_graph import ModelGraph, Params, choose_backend
from jaxserve.runner.program_arguments import ProgramShapes
from jaxserve.scheduler.draft_planner import Drafter
from jaxserve.speculative.cut import CutProposer
from jaxserve.speculative.drafter import SpeculativeDrafter
from jaxserve.speculative.in_runner import RunnerProposer
from jaxserve.speculative.ngram import NgramProposer
from jaxserve.speculative.proposer import Proposer
from jaxserve.tokenizer.vocabulary import first_difference
from jaxserve.weights.source import resolve_source


def max_num_drafts(speculative: SpeculativeConfig | None, max_num_seqs: int) -> int:
    """Draft tokens a step: one a row where all run, the limit of each where few do; at most twice the logits."""
    return 0 if speculative is None else max(max_num_seqs, speculative.num_speculative_tokens)


def make_drafter(speculative: SpeculativeConfig | None, buckets: Buckets, grammars: SlotGrammars) -> Drafter | None:
    """The scheduler's drafter, if there is to be one; it guesses nothing that a request's grammar forbids."""
    if speculative is None:
        return None
    return SpeculativeDrafter(
        CutProposer(_proposer(speculative), grammars.cut),
        max_tokens=speculative.num_speculative_tokens,
        step_sizes=buckets.token_sizes,
        is_adaptive=speculative.adaptive,
        max_len=speculative.max_model_len,
        drafts_for_prompts=speculative.method not in HEAD_METHODS,  # a head reads what the model gave the token before
    )


def open_models(
    config: Config,
    files: ModelFiles,
    backend: AttentionBackend,
    *,
    max_model_len: int,
    open_draft: Callable[[ModelSettings], ModelFiles] = open_model,
) -> tuple[ModelParts, ...]:
    """The model, and what drafts for it where the config names such; `ConfigError` where that does not fit it.

    `open_draft` finds a smaller model.
    """
    speculative = config.speculative.speculative_config
    if speculative is not None and speculative.method in HEAD_METHODS:
        return _with_head(config, speculative, files, backend, max_model_len)
    model = ModelParts(files, ModelGraph(files.decoder, dtype=files.dtype, backend=backend))
    draft = _draft_settings(config)
    if speculative is None or draft is None:
        return (model,)
    length = min(max_model_len, speculative.max_model_len or max_model_len)
    return model, _draft_model(config, open_draft(draft), draft.model, model, length)


def check_tokens(config: Config) -> None:
    """A draft is token ids: raise `ConfigError` where they mean something else to a smaller model than to the model."""
    draft, model = _draft_settings(config), config.model
    if draft is None:
        return
    sources = [
        resolve_source(settings.tokenizer or settings.model, revision=settings.revision, tokenizer_only=True)
        for settings in (draft, model)
    ]
    difference = first_difference(*sources)
    if difference is not None:
        raise ConfigError(
            f"draft model {draft.model!r} has another vocabulary than the model: token {difference.token_id} is "
            f"{difference.token!r} to it and {difference.other!r} to the model; a draft model must share the model's "
            "tokenizer"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadParts(ModelParts):
    """A draft head as it is before anything is loaded."""

    head: HeadFiles
    model: ModelGraph
    max_drafts: int  # a row

    def programs(self, shapes: ProgramShapes) -> HeadPrograms:
        shapes = replace(shapes, kv_spec=self.graph.kv_cache_spec())
        return HeadPrograms(self.graph, shapes, num_states=self.max_drafts + 1)

    def loaded(self, params: Params, model: Params, programs: Any, caches: list[LayerCache]) -> Loaded:
        params = self.head.complete(params, self.model, model)
        return LoadedHead(graph=self.graph, params=params, programs=programs, caches=caches)


def _with_head(
    config: Config, speculative: SpeculativeConfig, files: ModelFiles, backend: AttentionBackend, max_model_len: int
) -> tuple[ModelParts, ...]:
    is_dummy = config.model.load_format == "dummy"
    head = open_head(speculative, files, is_dummy=is_dummy, max_model_len=max_model_len)
    decoder = replace(files.decoder, feature_layers=head.feature_layers)
    model = ModelParts(files, ModelGraph(decoder, dtype=files.dtype, backend=backend))
    backend = _backend(config, "draft head", speculative.model or config.model.model, head.files, model.graph)
    graph = ModelGraph(
        head.config, dtype=files.dtype, backend=backend, family=head.family, numerics=model.graph.numerics
    )
    parts = HeadParts(head.files, graph, head=head, model=model.graph, max_drafts=speculative.num_speculative_tokens)
    return model, parts


def _draft_settings(config: Config) -> ModelSettings | None:
    """The smaller model that drafts, if one does."""
    speculative = config.speculative.speculative_config
    if speculative is None or speculative.model is None or speculative.method in HEAD_METHODS:
        return None
    return ModelSettings(
        model=speculative.model,
        revision=speculative.revision,
        dtype=config.model.dtype,
        load_format="dummy" if config.model.load_format == "dummy" else "auto",
        seed=config.model.seed,
    )


def _draft_model(config: Config, files: ModelFiles, name: str, target: ModelParts, max_model_len: int) -> ModelParts:
    _check_fits(name, files, target.files, max_model_len)
    backend = _backend(config, "draft model", name, files, target.graph)
    return ModelParts(files, ModelGraph(files.decoder, dtype=files.dtype, backend=backend), only_draws=True)


def _backend(config: Config, kind: str, name: str, files: ModelFiles, target: ModelGraph) -> AttentionBackend:
    """Attention for what drafts, on the model's mesh and blocks."""
    asked = config.runtime.attention_backend
    try:
        return choose_backend(
            files.decoder,
            dtype=files.dtype,
            block_size=target.backend.geometry.block_size,
            mesh=target.mesh,
            asked=None if asked == "auto" else asked,
        )
    except ConfigError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from error


def _proposer(speculative: SpeculativeConfig) -> Proposer:
    if speculative.method == "draft_model" or speculative.method in HEAD_METHODS:
        return RunnerProposer()
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
            f"{max_model_len}; set max_model_len to what both take, or speculative_config's own to what the draft takes"
        )
