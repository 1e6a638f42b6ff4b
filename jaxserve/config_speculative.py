"""`SpeculativeConfig`: which guesses are made of the tokens to come, under vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BeforeValidator, Field, model_validator

from jaxserve.config_values import Settings, parse_object
from jaxserve.errors import ConfigError

Method: TypeAlias = Literal["ngram", "draft_model", "eagle3", "mtp"]
METHODS: tuple[Method, ...] = get_args(Method)
HEAD_METHODS: tuple[Method, ...] = ("eagle3", "mtp")  # a layer that reads the model's hidden states
_NEEDS_MODEL: tuple[Method, ...] = ("draft_model", "eagle3")
_OTHER_NAMES = {"mimo_mtp": "mtp"}  # vLLM's
_LOOKUPS = ("prompt_lookup_min", "prompt_lookup_max")
_NOT_BUILT = ("eagle", "deepseek_mtp", "medusa", "mlp_speculator", "suffix", "ngram_gpu")  # vLLM has them

MAX_SPECULATIVE_TOKENS = 32


class SpeculativeConfig(Settings):
    """What `--speculative-config` holds."""

    method: Method = Field(
        description="ngram: what followed the last tokens where they stood before; draft_model: a smaller model; "
        "eagle3: an EAGLE-3 head; mtp: the head in a MiMo checkpoint."
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        description="Where the smaller model or the head is, made for the same vocabulary. [mtp: the model's own]",
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of its hub id.")
    num_speculative_tokens: int = Field(
        default=5, ge=1, le=MAX_SPECULATIVE_TOKENS, description="Most tokens guessed at once for a request."
    )
    prompt_lookup_min: int = Field(
        default=2,
        ge=1,
        le=16,
        description="ngram: fewest tokens that must repeat. [prompt_lookup_max if given, else 2]",
    )
    prompt_lookup_max: int = Field(
        default=5, ge=1, le=16, description="ngram: most tokens that are compared. [prompt_lookup_min if given, else 5]"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="draft_model: length beyond which nothing is guessed. [the model's]"
    )
    draft_tensor_parallel_size: int | None = Field(
        default=None, ge=1, description="1 or tensor_parallel_size: what drafts is spread as the model is."
    )
    adaptive: bool = Field(
        default=True, description="Guess only as much as measured acceptance and step times say is worth it."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_the_method(cls, values: Any) -> Any:
        """Take `model: ngram` for the method, as vLLM does, and say of what is not built that it is not."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("model") == "ngram":
            values.setdefault("method", values.pop("model"))
        if values.get("model") is not None:
            values.setdefault("method", "draft_model")
        for one, other in (_LOOKUPS, _LOOKUPS[::-1]):
            if one in values:
                values.setdefault(other, values[one])
        method = values.get("method")
        if isinstance(method, str) and method in _OTHER_NAMES:
            method = values["method"] = _OTHER_NAMES[method]
        if method in _NOT_BUILT:
            raise ValueError(f"must have a method that is built ({', '.join(METHODS)}); {method!r} is not")
        if method not in METHODS:
            raise ValueError(f"must name a method, one of {', '.join(METHODS)}; it is {method!r}")
        return values

    @model_validator(mode="after")
    def _check_together(self) -> SpeculativeConfig:
        if self.method in _NEEDS_MODEL and self.model is None:
            raise ValueError(f"must have a model with method {self.method!r}: the folder or hub id of what drafts")
        if self.method == "ngram" and self.model is not None:
            raise ValueError(f"must have no model with method 'ngram', which needs none; model: {self.model!r}")
        if self.revision is not None and self.model is None:
            raise ValueError(f"must have no revision ({self.revision!r}) without a model that it is of")
        if self.max_model_len is not None and self.method != "draft_model":
            raise ValueError(
                f"must have no max_model_len ({self.max_model_len}) with method {self.method!r}: only a draft model "
                "has a length of its own"
            )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"must have prompt_lookup_min ({self.prompt_lookup_min}) at most prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        return self


class SpeculativeSettings(Settings):
    """Guesses of the tokens to come."""

    speculative_config: Annotated[SpeculativeConfig | None, BeforeValidator(parse_object)] = Field(
        default=None,
        description='Speculative decoding, such as {"method": "ngram", "num_speculative_tokens": 5}. [off]',
    )


def check_spread(settings: SpeculativeSettings, tensor_parallel_size: int) -> None:
    """Raise `ConfigError` where what drafts is to be on other devices than the model."""
    asked = None if settings.speculative_config is None else settings.speculative_config.draft_tensor_parallel_size
    if asked not in (None, 1, tensor_parallel_size):
        raise ConfigError(
            "speculative_config.draft_tensor_parallel_size must be 1 or tensor_parallel_size "
            f"({tensor_parallel_size}), got {asked}: what drafts is spread over the model's devices"
        )
