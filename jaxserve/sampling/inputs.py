"""What the sampler is told about each row: the arrays of one step, and the host's memory of them by slot."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Sharding

from jaxserve.parallel.mesh import to_devices
from jaxserve.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

# greedy: argmax alone. random: temperature, top_k, top_p, min_p, seed. full: whatever there is, and logprobs.
Variant = Literal["greedy", "random", "full"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)  # each can do what those before it can
GREEDY, RANDOM, FULL = range(3)

MAX_MASKED_STOP_IDS = 2 * MAX_STOP_TOKEN_IDS  # the request's own, and the model's EOS ids
MASK_BITS = 32
_MAX_GATHERED = 4  # choices of rows: the model's, those that draft, fewer where drafts have different lengths
NO_TOKEN = 2**31 - 1  # padding of token id lists; no vocabulary has it
ANY_TOKEN = -1  # in a bad word's prefix: matches whatever stands there

_INT_FIELDS = ("seed", "seed_high", "position", "top_k", "num_tokens", "min_tokens", "has_allowed", "has_edits")
_FLOAT_FIELDS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_INT = {name: index for index, name in enumerate(_INT_FIELDS)}
_FLOAT = {name: index for index, name in enumerate(_FLOAT_FIELDS)}

Leaf = Any  # an array, of JAX or NumPy, or what jax.tree.map puts in its place: a shape, a sharding


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["allowed", "bias_ids", "bias_values", "bad_words", "stop_ids"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LogitRules:
    """The large and rarely used part of a "full" step, read only where a row's `has_allowed` or `has_edits` says so."""

    allowed: Leaf  # u32[rows, ceil(vocab / 32)], bit t % 32 of word t // 32 is token t
    bias_ids: Leaf  # i32[rows, MAX_LOGIT_BIAS], NO_TOKEN past the end
    bias_values: Leaf  # f32[rows, MAX_LOGIT_BIAS]
    bad_words: Leaf  # i32[rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS], right-aligned: ANY_TOKEN .. prefix, last token
    stop_ids: Leaf  # i32[rows, MAX_MASKED_STOP_IDS], NO_TOKEN past the end

    @classmethod
    def empty(cls, rows: int, vocab_size: int) -> LogitRules:
        """Rules that change nothing, as NumPy arrays."""
        bad_words = np.full((rows, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), ANY_TOKEN, np.int32)
        bad_words[:, :, -1] = NO_TOKEN
        return cls(
            allowed=np.zeros((rows, -(-vocab_size // MASK_BITS)), np.uint32),
            bias_ids=np.full((rows, MAX_LOGIT_BIAS), NO_TOKEN, np.int32),
            bias_values=np.zeros((rows, MAX_LOGIT_BIAS), np.float32),
            bad_words=bad_words,
            stop_ids=np.full((rows, MAX_MASKED_STOP_IDS), NO_TOKEN, np.int32),
        )


@partial(jax.tree_util.register_dataclass, data_fields=["ints", "floats", "rules"], meta_fields=[])
@dataclass(frozen=True)
class SamplingInputs:
    """One step's sampling parameters, row for row; the properties name the columns."""

    ints: Leaf  # i32[rows, 8]
    floats: Leaf  # f32[rows, 6]
    rules: LogitRules | None = None  # in the "full" variant

    @property
    def seed(self) -> jax.Array:
        """u32[rows, 2]: the low and the high half."""
        bits = jax.numpy.asarray(self.ints[:, _INT["seed"] : _INT["seed"] + 2])
        return jax.lax.bitcast_convert_type(bits, jax.numpy.uint32)

    @property
    def position(self) -> jax.Array:
        """i32[rows]: how many tokens were generated before this one."""
        return self._int("position")

    @property
    def top_k(self) -> jax.Array:
        """i32[rows]: 0 keeps all."""
        return self._int("top_k")

    @property
    def num_tokens(self) -> jax.Array:
        """i32[rows]: tokens of the row's history, prompt and output."""
        return self._int("num_tokens")

    @property
    def num_prompt_tokens(self) -> jax.Array:
        """i32[rows]: how many of them are the prompt's."""
        return self.num_tokens - self.position

    @property
    def min_tokens(self) -> jax.Array:
        """i32[rows]: the stop tokens are masked while `position` is below."""
        return self._int("min_tokens")

    @property
    def has_allowed(self) -> jax.Array:
        """bool[rows]: only tokens in `rules.allowed` may be chosen."""
        return self._int("has_allowed") > 0

    @property
    def has_edits(self) -> jax.Array:
        """bool[rows]: there is a logit bias or a bad word."""
        return self._int("has_edits") > 0

    @property
    def temperature(self) -> jax.Array:
        """f32[rows]: 0 is greedy."""
        return self._float("temperature")

    @property
    def top_p(self) -> jax.Array:
        """f32[rows] in (0, 1]."""
        return self._float("top_p")

    @property
    def min_p(self) -> jax.Array:
        """f32[rows] in [0, 1]."""
        return self._float("min_p")

    @property
    def repetition_penalty(self) -> jax.Array:
        """f32[rows], 1 is none."""
        return self._float("repetition_penalty")

    @property
    def frequency_penalty(self) -> jax.Array:
        """f32[rows], 0 is none."""
        return self._float("frequency_penalty")

    @property
    def presence_penalty(self) -> jax.Array:
        """f32[rows], 0 is none."""
        return self._float("presence_penalty")

    def _int(self, name: str) -> jax.Array:
        return jax.numpy.asarray(self.ints[:, _INT[name]])

    def _float(self, name: str) -> jax.Array:
        return jax.numpy.asarray(self.floats[:, _FLOAT[name]])


def abstract_inputs(rows: int, variant: Variant, *, vocab_size: int) -> SamplingInputs:
    """The shapes of a step's inputs, to compile for."""
    rules = None
    if variant == "full":
        rules = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), LogitRules.empty(rows, vocab_size))
    ints = jax.ShapeDtypeStruct((rows, len(_INT_FIELDS)), np.int32)
    floats = jax.ShapeDtypeStruct((rows, len(_FLOAT_FIELDS)), np.float32)
    return SamplingInputs(ints, floats, rules)


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The tokens that some of a step's rows may choose from in this step, whatever their slots allow beside."""

    rows: np.ndarray  # i64[masks]
    allowed: np.ndarray  # u32[masks, ceil(vocab / 32)], as `LogitRules.allowed`


@dataclass(slots=True)
class SlotParameters:
    """What each slot's request asks of the sampler: written once a request, gathered every step. Slot 0 is padding.

    With `sharding`, the rules of a "full" step go to the device once and stay there while the same rows come again, be
    it in turns with others: the model's rows and those of what drafts for it alternate.
    """

    max_num_seqs: int
    vocab_size: int
    sharding: Sharding | None = None
    _ints: np.ndarray = field(init=False)  # i32[slots, 8]
    _floats: np.ndarray = field(init=False)  # f32[slots, 6]
    _levels: np.ndarray = field(init=False)  # i8[slots], index into VARIANTS but for min_tokens
    _rules: LogitRules = field(init=False)
    _gathered: dict[bytes, LogitRules] = field(init=False, default_factory=dict)  # by slots, the latest last

    def __post_init__(self) -> None:
        slots = self.max_num_seqs + 1
        self._ints = np.zeros((slots, len(_INT_FIELDS)), np.int32)
        self._floats = np.zeros((slots, len(_FLOAT_FIELDS)), np.float32)
        self._floats[0] = _floats_of(SamplingParams(temperature=0.0))
        self._levels = np.zeros(slots, np.int8)
        self._rules = LogitRules.empty(slots, self.vocab_size)

    def set(self, slot: int, params: SamplingParams, *, stop_token_ids: list[int], num_prompt_tokens: int) -> None:
        """A request takes a slot; `stop_token_ids` are what min_tokens masks, EOS included."""
        if params.seed is None and not params.is_greedy:
            raise ValueError("a sampled request needs a seed before it reaches the runner")
        self._gathered.clear()
        self._set_rules(slot, params, stop_token_ids)
        seed = params.seed or 0
        row = self._ints[slot]
        row[_INT["seed"] : _INT["seed"] + 2] = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
        row[_INT["position"]] = -num_prompt_tokens  # plus the number of tokens
        row[_INT["top_k"]] = 0 if params.top_k < 0 or params.top_k >= self.vocab_size else params.top_k
        row[_INT["min_tokens"]] = params.min_tokens if stop_token_ids else 0
        row[_INT["has_allowed"]] = params.allowed_token_ids is not None
        row[_INT["has_edits"]] = bool(params.logit_bias or params.bad_words_token_ids)
        self._floats[slot] = _floats_of(params)
        self._levels[slot] = _level(params)

    def gather(
        self,
        slots: np.ndarray,
        num_tokens: np.ndarray,
        *,
        num_rows: int | None = None,
        masks: TokenMasks | None = None,
    ) -> tuple[Variant, SamplingInputs]:
        """The inputs of a step whose rows are `slots` with `num_tokens` known tokens each, padded to `num_rows`."""
        count = len(slots)
        padded = np.zeros(count if num_rows is None else num_rows, np.int64)
        padded[:count] = slots
        ints = self._ints[padded]
        ints[:count, _INT["position"]] += num_tokens
        ints[:count, _INT["num_tokens"]] = num_tokens
        masks_stop_ids = ints[:, _INT["position"]] < ints[:, _INT["min_tokens"]]
        needs_rules = masks is not None or masks_stop_ids.any()
        level = FULL if needs_rules else int(self._levels[padded].max(initial=GREEDY))
        rules = self._gather_rules(padded) if level == FULL else None
        if masks is not None and rules is not None:
            rules = replace(rules, allowed=self._masked(padded, ints, masks))
            ints[masks.rows, _INT["has_allowed"]] = 1
        return VARIANTS[level], SamplingInputs(ints, self._floats[padded], rules)

    def _masked(self, slots: np.ndarray, ints: np.ndarray, masks: TokenMasks) -> np.ndarray:
        """What each row's slot allows; with a mask, what that allows of it."""
        allowed = self._rules.allowed[slots]
        has_own = ints[masks.rows, _INT["has_allowed"], None] > 0
        allowed[masks.rows] = np.where(has_own, allowed[masks.rows] & masks.allowed, masks.allowed)
        return allowed

    def _gather_rules(self, slots: np.ndarray) -> LogitRules:
        key = slots.tobytes()
        rules = self._gathered.pop(key, None)
        if rules is None:
            rules = jax.tree.map(lambda table: table[slots], self._rules)
            if self.sharding is not None:
                rules = jax.tree.map(partial(to_devices, where=self.sharding), rules)
        self._gathered[key] = rules
        if len(self._gathered) > _MAX_GATHERED:
            del self._gathered[next(iter(self._gathered))]
        return rules

    def _set_rules(self, slot: int, params: SamplingParams, stop_token_ids: list[int]) -> None:
        if len(stop_token_ids) > MAX_MASKED_STOP_IDS:
            raise ValueError(f"at most {MAX_MASKED_STOP_IDS} stop token ids a request, got {len(stop_token_ids)}")
        empty = LogitRules.empty(1, self.vocab_size)
        jax.tree.map(lambda table, nothing: table.__setitem__(slot, nothing[0]), self._rules, empty)
        rules = self._rules
        if params.allowed_token_ids is not None:
            rules.allowed[slot] = pack_mask(params.allowed_token_ids, self.vocab_size)
        bias = params.logit_bias or {}
        rules.bias_ids[slot, : len(bias)] = list(bias)
        rules.bias_values[slot, : len(bias)] = list(bias.values())
        for index, word in enumerate(params.bad_words_token_ids or ()):
            rules.bad_words[slot, index, -len(word) :] = word
        rules.stop_ids[slot, : len(stop_token_ids)] = stop_token_ids


def pack_mask(token_ids: list[int], vocab_size: int) -> np.ndarray:
    """A set of tokens as u32[ceil(vocab / 32)].

    >>> pack_mask([0, 33], vocab_size=40)
    array([1, 2], dtype=uint32)
    """
    bits = np.zeros(-(-vocab_size // MASK_BITS) * MASK_BITS, np.uint8)
    bits[token_ids] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def _floats_of(params: SamplingParams) -> tuple[float, ...]:
    values = {name: getattr(params, name) for name in _FLOAT_FIELDS}
    return tuple((values | {"temperature": 0.0 if params.is_greedy else params.temperature}).values())


def _level(params: SamplingParams) -> int:
    penalises = params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
    has_rules = params.allowed_token_ids is not None or bool(params.logit_bias or params.bad_words_token_ids)
    if penalises or has_rules or params.logprobs is not None:
        return FULL
    return GREEDY if params.is_greedy else RANDOM
