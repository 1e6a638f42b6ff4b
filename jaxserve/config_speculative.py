"""`SpeculativeConfig`: which guesses are made of the tokens to come, under vLLM's names."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from jaxserve.config_values import Settings, parse_object

Method: TypeAlias = Literal["ngram"]
METHODS: tuple[Method, ...] = ("ngram",)
# vLLM's, which need a second model or heads of their own.
_NOT_BUILT = ("draft_model", "eagle", "eagle3", "mtp", "medusa", "mlp_speculator", "suffix", "ngram_gpu")

MAX_SPECULATIVE_TOKENS = 32


class SpeculativeConfig(Settings):
    """What `--speculative-config` holds."""

    method: Method = Field(description="ngram: what followed the last tokens where they stood before.")
    num_speculative_tokens: int = Field(
        default=5, ge=1, le=MAX_SPECULATIVE_TOKENS, description="Most tokens guessed at once for a request."
    )
    prompt_lookup_min: int = Field(default=2, ge=1, le=16, description="ngram: fewest tokens that must repeat.")
    prompt_lookup_max: int = Field(default=5, ge=1, le=16, description="ngram: most tokens that are compared.")
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
        if values.get("model") in METHODS:
            values.setdefault("method", values.pop("model"))
        method = values.get("method", "draft_model" if "model" in values else None)
        if method in _NOT_BUILT:
            raise ValueError(f"must have a method that is built ({', '.join(METHODS)}); {method!r} is not")
        if method not in METHODS:
            raise ValueError(f"must name a method, one of {', '.join(METHODS)}; it is {method!r}")
        return values

    @model_validator(mode="after")
    def _check_lookup(self) -> SpeculativeConfig:
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
