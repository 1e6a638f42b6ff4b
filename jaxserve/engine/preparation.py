"""`RequestPreparer`: turns what a user asked into sequences for the engine, or says what is wrong with it."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, replace

import msgspec

from jaxserve.config import Config, ModelSettings, SchedulerSettings
from jaxserve.engine.client import ModelInfo
from jaxserve.engine.core_facts import CoreInfo
from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.request import EngineRequest
from jaxserve.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_N, SamplingParams
from jaxserve.structured.checker import GrammarChecker
from jaxserve.structured.grammar_text import grammar_text
from jaxserve.structured.token_table import TokenTable
from jaxserve.tokenizer.decoding import DecoderKind
from jaxserve.tokenizer.tokenizer import Tokenizer
from jaxserve.weights.source import resolve_source

MAX_CHARS_PER_TOKEN = 128  # the longest tokens of large vocabularies are runs of 128 spaces
SEED_LIMIT = 2**53 - MAX_N  # so that the seeds of all n sequences are exact in JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A checked request: what the engine gets, and what the output side needs."""

    request_id: str
    prompt: str | None  # None where the user sent tokens
    prompt_token_ids: list[int]
    params: SamplingParams  # seed, max_tokens and bad words filled in
    sequences: list[EngineRequest]  # params.n of them


MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


class RequestPreparer:
    """Checks and tokenises requests for one model. Safe to call from several threads."""

    def __init__(self, tokenizer: Tokenizer, info: CoreInfo, *, seed: int, scheduler: SchedulerSettings) -> None:
        """`seed`: of the seeds that requests get which come without."""
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._max_model_len = info.max_model_len
        self._vocab_size = info.vocab_size
        self._eos_token_ids = sorted({*info.eos_token_ids, *tokenizer.eos_token_ids})
        self._seeds = random.Random(seed)  # of requests that come without
        self._serials = itertools.count()
        self._checker = GrammarChecker(self._token_table)

    def close(self) -> None:
        """End the process that checks grammars, if one was needed."""
        self._checker.close()

    def prepare(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> PreparedRequest:
        """The whole way from a user's request to the engine's; raises `InvalidRequestError`."""
        arrival_time_s = time.monotonic()
        params.validate().validate_token_ids(self._vocab_size)
        if params.n > self._scheduler.max_queued_requests:
            raise InvalidRequestError(
                f"n={params.n} asks for more sequences than the queue ever holds, "
                f"{self._scheduler.max_queued_requests}; lower n, or serve with a larger max_queued_requests",
                param="n",
            )
        self._check_priority(priority)
        token_ids = self._prompt_token_ids(prompt, params, add_special_tokens)
        params = self._complete(params, num_prompt_tokens=len(token_ids))
        # A serial number, so that late tokens of an aborted request cannot reach one that reuses its id.
        serial = next(self._serials)
        sequences = [
            EngineRequest(
                request_id=f"{request_id}-{serial}-{index}",
                prompt_token_ids=token_ids,
                sampling_params=_for_sequence(params, index),
                eos_token_ids=self._eos_token_ids,
                priority=priority,
                arrival_time_s=arrival_time_s,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]
        return PreparedRequest(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            sequences=sequences,
        )

    def _check_priority(self, priority: int) -> None:
        if not MIN_PRIORITY <= priority <= MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be an integer from {MIN_PRIORITY} to {MAX_PRIORITY}, got {priority}", param="priority"
            )
        if priority != 0 and self._scheduler.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority is {priority}, but this server takes requests in the order in which they come; leave it "
                "out, or serve with --scheduling-policy priority",
                param="priority",
            )

    def _prompt_token_ids(self, prompt: str | list[int], params: SamplingParams, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            max_chars = self._max_model_len * MAX_CHARS_PER_TOKEN
            if len(prompt) > max_chars and params.truncate_prompt_tokens is None:
                raise PromptTooLongError(
                    f"the prompt has {len(prompt)} characters, which cannot fit the model's context of "
                    f"{self._max_model_len} tokens; shorten it"
                )
            token_ids = self._encode(prompt, add_special_tokens, param="prompt")
        else:
            token_ids = self._checked_token_ids(prompt, param="prompt")
        if not token_ids:
            raise InvalidRequestError("the prompt is empty; it needs at least one token", param="prompt")
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        return token_ids

    def _encode(self, text: str, add_special_tokens: bool, *, param: str) -> list[int]:
        """A text's tokens; a tokenizer may have added ones that the model has no embedding for."""
        token_ids = self._tokenizer.encode(text, add_special_tokens)
        if (highest := max(token_ids, default=0)) >= self._vocab_size:
            raise InvalidRequestError(
                f"{param} holds the token {self._tokenizer.token(highest)!r}, whose id {highest} the model does not "
                f"know: its vocabulary has 0 to {self._vocab_size - 1}",
                param=param,
            )
        return token_ids

    def _checked_token_ids(self, values: list[int], *, param: str) -> list[int]:
        try:
            token_ids = msgspec.convert(values, list[int])
        except msgspec.ValidationError as error:
            raise InvalidRequestError(f"{param} must be text or a list of token ids: {error}", param=param) from error
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"{param} holds token id {token_id}, the vocabulary has 0 to {self._vocab_size - 1}", param=param
                )
        return token_ids

    def _complete(self, params: SamplingParams, *, num_prompt_tokens: int) -> SamplingParams:
        """Fill in what the user left open: max_tokens, seed, bad words as tokens."""
        room = self._max_model_len - num_prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens; the model's context takes {self._max_model_len}, and at "
                f"least one must be left for the answer; shorten the prompt, send truncate_prompt_tokens, or serve "
                f"with a larger max_model_len"
            )
        max_tokens = params.max_tokens if params.max_tokens is not None else room
        if max_tokens > room:
            raise PromptTooLongError(
                f"the prompt has {num_prompt_tokens} tokens and max_tokens asks for {max_tokens} more, together "
                f"{num_prompt_tokens + max_tokens}; the model's context takes {self._max_model_len}; shorten the "
                f"prompt or lower max_tokens to {room} at most",
                param="max_tokens",
            )
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({params.min_tokens}) does not fit: after a prompt of {num_prompt_tokens} tokens the "
                f"context has room for {room}",
                param="min_tokens",
            )
        completed = replace(
            params,
            max_tokens=max_tokens,
            seed=self._seeds.randrange(SEED_LIMIT) if params.seed in (None, -1) else params.seed,
            bad_words_token_ids=self._bad_words_token_ids(params),
            structured_outputs_grammar=self._grammar(params),
        )
        self._check_a_token_is_left(completed)
        return completed

    def _grammar(self, params: SamplingParams) -> str | None:
        """The grammar of structured_outputs, once it is known to compile."""
        if params.structured_outputs is None:
            return None
        grammar = grammar_text(params.structured_outputs)
        self._checker.check(grammar)
        return grammar

    def _token_table(self) -> TokenTable:
        if not self._eos_token_ids:
            raise InvalidRequestError(
                "structured_outputs need a token that ends an answer, and the model has no end-of-sequence token",
                param="structured_outputs",
            )
        if self._tokenizer.decoding.kind is DecoderKind.OTHER:
            raise InvalidRequestError(
                "structured_outputs need each token's part of the text, and this model's tokenizer has a decoder that "
                "does not tell: neither byte-level nor SentencePiece's",
                param="structured_outputs",
            )
        return TokenTable.of(self._tokenizer, vocab_size=self._vocab_size, eos_ids=self._eos_token_ids)

    def _check_a_token_is_left(self, params: SamplingParams) -> None:
        """Of allowed_token_ids, one must be free at every position."""
        if params.allowed_token_ids is None:
            return
        left = set(params.allowed_token_ids) - {sequence[-1] for sequence in params.bad_words_token_ids or ()}
        if params.min_tokens:
            left -= {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_token_ids)}
        if not left:
            raise InvalidRequestError(
                "allowed_token_ids leaves no token to choose: each one could be forbidden by bad_words, or by "
                "min_tokens, which holds back the end of text and stop_token_ids; allow another token",
                param="allowed_token_ids",
            )

    def _bad_words_token_ids(self, params: SamplingParams) -> list[list[int]] | None:
        """Each bad word as tokens, as it reads at the start of a text and after a space."""
        given = params.bad_words_token_ids or ()
        sequences = [self._checked_token_ids(sequence, param="bad_words") for sequence in given]
        for word in params.bad_words or ():
            if len(word) > MAX_BAD_WORD_TOKENS * MAX_CHARS_PER_TOKEN:
                raise InvalidRequestError(
                    f"a bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens, one has {len(word)} characters",
                    param="bad_words",
                )
            bare = self._encode(word.lstrip(" ") or word, False, param="bad_words")
            spaced = self._encode(" " + word.lstrip(" "), False, param="bad_words")
            sequences.append(bare)
            # " word" that is a token for the space and then the bare word's tokens is banned with the bare word.
            if spaced[-len(bare) :] != bare:
                sequences.append(spaced)
        for sequence in sequences:
            if not 1 <= len(sequence) <= MAX_BAD_WORD_TOKENS:
                raise InvalidRequestError(
                    f"a bad word must have 1 to {MAX_BAD_WORD_TOKENS} tokens, one has {len(sequence)}",
                    param="bad_words",
                )
        if len(sequences) > MAX_BAD_WORDS:
            raise InvalidRequestError(
                f"bad_words come to {len(sequences)} token sequences (with and without a leading space), "
                f"at most {MAX_BAD_WORDS} are taken",
                param="bad_words",
            )
        return sequences or None


def _for_sequence(params: SamplingParams, index: int) -> SamplingParams:
    """Sequence `index`'s parameters; the prompt's log-probabilities are computed once, by the first."""
    own = replace(params.for_sequence(index), structured_outputs=None)  # the engine reads its grammar
    return own if index == 0 else replace(own, prompt_logprobs=None)


def load_tokenizer(settings: ModelSettings) -> Tokenizer:
    """The tokenizer that goes with a model."""
    return Tokenizer.from_source(
        resolve_source(settings.tokenizer or settings.model, revision=settings.revision, tokenizer_only=True)
    )


def model_info(config: Config, info: CoreInfo) -> ModelInfo:
    """What clients may want to know, from the settings and from what the core found in the checkpoint."""
    return ModelInfo(
        served_names=config.model.served_names,
        root=config.model.model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        created_s=int(time.time()),
        fingerprint=info.fingerprint,
        max_queued_requests=config.scheduler.max_queued_requests,
        default_sampling=info.default_sampling,
    )
