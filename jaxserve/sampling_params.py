"""What one request asks of the sampler: vLLM's and OpenAI's fields, their limits, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from jaxserve.errors import InvalidRequestError
from jaxserve.structured_outputs import StructuredOutputsParams as StructuredOutputsParams  # beside it, as in vLLM

MAX_LOGPROBS = 20  # alternatives a position; the sampler always computes this many when any row asks
MAX_N = 128  # sequences a request
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_BAD_WORDS = 64  # sequences a request
MAX_BAD_WORD_TOKENS = 16  # tokens a sequence
MAX_LOGIT_BIAS = 1024  # entries a request
MAX_STOP_TOKEN_IDS = 64
MAX_ALLOWED_TOKEN_IDS = 2**20
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # negative ones count back from 2^64

OutputKind = Literal["cumulative", "delta", "final_only"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Frozen; `validate()` raises `InvalidRequestError`.

    Order of application: structured_outputs, allowed_token_ids, logit_bias, bad_words, min_tokens, penalties,
    temperature, min_p, top_k, top_p. `temperature == 0` is greedy.

    As vLLM's class of this name, but for `max_tokens`: left out, an answer goes on as far as the context reaches, where
    vLLM's ends after 16 tokens.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 (or -1) means all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # `bad_words` as tokens, filled in beside the tokenizer
    structured_outputs: StructuredOutputsParams | None = None
    structured_outputs_grammar: str | None = None  # the same as llguidance reads it, filled in beside the tokenizer
    seed: int | None = None  # -1 means none too, as in vLLM
    max_tokens: int | None = None  # None: as far as the context reaches
    min_tokens: int = 0
    stop: str | list[str] | None = None  # one or several; see `stop_strings`
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives a generated token; 0 means the chosen one alone
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep the last so many prompt tokens
    output_kind: OutputKind = "cumulative"

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list, whichever way it was given."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def is_greedy(self) -> bool:
        """True where the token is the argmax."""
        return self.temperature < MIN_TEMPERATURE

    @property
    def ruling_field(self) -> str | None:
        """The field that most narrows what may be chosen; None where none forbids any token."""
        ruling = ("structured_outputs", "allowed_token_ids", "bad_words", "min_tokens", "logit_bias")
        return next((name for name in ruling if getattr(self, name)), None)

    def validate(self) -> SamplingParams:
        """Check every field and return self; raises `InvalidRequestError` naming the first wrong one."""
        for name, (low, high) in _INTEGER_RANGES.items():
            _check_integer(name, getattr(self, name), low, high)
        for name, (low, high) in _FLOAT_RANGES.items():
            _check_float(name, getattr(self, name), low, high)
        if self.top_p <= 0:
            raise InvalidRequestError(f"top_p must be in (0, 1], got {self.top_p}", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if not self.spaces_between_special_tokens:
            raise InvalidRequestError(
                "spaces_between_special_tokens=false is not supported: special tokens are written as the tokenizer "
                "decodes them",
                param="spaces_between_special_tokens",
            )
        self._validate_lists()
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputsParams):
                kind = type(self.structured_outputs).__name__
                raise InvalidRequestError(
                    f"structured_outputs must be StructuredOutputsParams, got {kind}", param="structured_outputs"
                )
            self.structured_outputs.validate()
        return self

    def _validate_lists(self) -> None:
        _check_list("stop", [self.stop] if isinstance(self.stop, str) else self.stop, str, MAX_STOP_STRINGS)
        _check_list("bad_words", self.bad_words, str, MAX_BAD_WORDS)
        _check_list("stop_token_ids", self.stop_token_ids, int, MAX_STOP_TOKEN_IDS)
        _check_list("allowed_token_ids", self.allowed_token_ids, int, MAX_ALLOWED_TOKEN_IDS)
        for text in self.stop_strings:
            if not text or len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequestError(
                    f"each stop string must have 1 to {MAX_STOP_STRING_CHARS} characters, got {len(text)}", param="stop"
                )
        if any(not word for word in self.bad_words or ()):
            raise InvalidRequestError("bad_words must not hold an empty string", param="bad_words")
        if self.stop_strings and not self.detokenize:
            raise InvalidRequestError("stop strings need detokenize=true", param="stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequestError("allowed_token_ids must hold at least one token id", param="allowed_token_ids")
        if len(self.logit_bias or ()) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias or ())}",
                param="logit_bias",
            )
        for token_id, bias in (self.logit_bias or {}).items():
            _check_float(f"logit_bias[{token_id}]", bias, -100.0, 100.0)

    def validate_token_ids(self, vocab_size: int) -> None:
        """Check every token id against the vocabulary; raises `InvalidRequestError`."""
        fields = {
            "logit_bias": self.logit_bias,
            "allowed_token_ids": self.allowed_token_ids,
            "stop_token_ids": self.stop_token_ids,
        }
        for name, token_ids in fields.items():
            for token_id in token_ids or ():
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds token id {token_id}, the vocabulary has 0 to {vocab_size - 1}", param=name
                    )

    def for_sequence(self, index: int) -> SamplingParams:
        """The parameters of sequence `index` of `n`: one sequence, its own seed (seed + index), from 0 up."""
        seed = None if self.seed is None else (self.seed + index) % (MAX_SEED + 1)
        return replace(self, n=1, seed=seed)


MIN_TEMPERATURE = 1e-5  # below this a temperature is greedy: logits / T would overflow float32

_INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "top_k": (-1, 2**31 - 1),
    "seed": (MIN_SEED, MAX_SEED),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "truncate_prompt_tokens": (1, 2**31 - 1),
}
_FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 100.0),  # smaller ones overflow a logit, and the row would end as not finite
}
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"})


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequestError(f"{name} must be an integer from {low} to {high}, got {value!r}", param=name)


def _check_float(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type]
        param = name.split("[")[0]
        raise InvalidRequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}", param=param)


def _check_list(name: str, values: object, item: type, limit: int) -> None:
    if values is None:
        return
    if not isinstance(values, (list, tuple)) or any(not isinstance(v, item) or isinstance(v, bool) for v in values):
        raise InvalidRequestError(f"{name} must be a list of {item.__name__}, got {values!r:.80}", param=name)
    if len(values) > limit:
        raise InvalidRequestError(f"{name} takes at most {limit} entries, got {len(values)}", param=name)
