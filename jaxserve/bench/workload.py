"""`Workload`: the requests of a benchmark, as random token ids that are the same for the same seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LengthRange:
    """A length in tokens: fixed, or drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, flag: str) -> LengthRange:
        """Read "128" or "16:256"; `flag` is named in the error.

        >>> LengthRange.parse("16:256", "--input-len")
        LengthRange(low=16, high=256)
        """
        low, separator, high = text.partition(":")
        try:
            parsed = cls(int(low), int(high) if separator else int(low))
        except ValueError:
            parsed = None
        if parsed is None or not 1 <= parsed.low <= parsed.high:
            raise ConfigError(f"{flag} must be a number of tokens such as 128, or a range such as 16:256, got {text!r}")
        return parsed

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """A prompt, and how many tokens to generate, end-of-sequence or not."""

    prompt_token_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the engine. The first `shared_prefix_len` tokens of all prompts are equal."""

    num_prompts: int
    input_len: LengthRange  # the shared prefix included
    output_len: LengthRange
    shared_prefix_len: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shared_prefix_len >= self.input_len.low:
            raise ConfigError(
                f"--shared-prefix-len ({self.shared_prefix_len}) must be less than --input-len ({self.input_len})"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest request that may be drawn, prompt and answer."""
        return self.input_len.high + self.output_len.high

    def check_fits(self, max_model_len: int) -> None:
        """Raise `ConfigError` where a request may not fit the model's context: it would be refused, or cut short."""
        if self.longest > max_model_len:
            raise ConfigError(
                f"--input-len ({self.input_len}) and --output-len ({self.output_len}) come to {self.longest} tokens, "
                f"the model's context is {max_model_len}; shorten them, or raise --max-model-len"
            )

    def requests(self, vocab_size: int) -> list[BenchRequest]:
        """Draw the requests; ids are below `vocab_size`."""
        generator = random.Random(self.seed)
        prefix = _random_ids(generator, self.shared_prefix_len, vocab_size)
        requests = []
        for _ in range(self.num_prompts):
            own_len = self.input_len.draw(generator) - self.shared_prefix_len
            prompt = prefix + _random_ids(generator, own_len, vocab_size)
            requests.append(BenchRequest(prompt_token_ids=prompt, output_len=self.output_len.draw(generator)))
        return requests

    def describe(self) -> dict[str, str | int]:
        """The workload as a report shows it."""
        return {
            "num_prompts": self.num_prompts,
            "input_len": str(self.input_len),
            "output_len": str(self.output_len),
            "shared_prefix_len": self.shared_prefix_len,
            "seed": self.seed,
        }


def _random_ids(generator: random.Random, count: int, vocab_size: int) -> list[int]:
    lowest = min(256, vocab_size // 2)  # special tokens mostly come first
    return [generator.randrange(lowest, vocab_size) for _ in range(count)]
