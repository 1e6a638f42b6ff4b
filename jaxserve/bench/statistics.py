"""Pure arithmetic of benchmarks: percentiles, and what a run's request times say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

PERCENTILES = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of all lie, interpolated between neighbours.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.5
    """
    if not values:
        raise ValueError("no values: a percentile needs at least one")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(slots=True)
class RequestTimes:
    """When a request was sent and its tokens came, in seconds of one monotonic clock."""

    sent_s: float
    num_prompt_tokens: int
    arrivals_s: list[float] = field(default_factory=list)  # one a message that brought tokens
    num_output_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        """Sent to first token."""
        return self.arrivals_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Sent to last token."""
        return self.arrivals_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time a token after the first; None of a single token."""
        if self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between messages that brought tokens."""
        return [later - earlier for earlier, later in zip(self.arrivals_s, self.arrivals_s[1:], strict=False)]


Summary = dict[str, float]  # name with unit -> value


def summarize(requests: Sequence[RequestTimes], duration_s: float) -> Summary:
    """Throughput and the distributions of latencies of requests that took `duration_s` together.

    `ttft` is the time to the first token, `tpot` the mean time a token after it (one value a request), `itl` the gap
    between two messages with tokens (many values a request), `e2e` the time to the last token.
    """
    num_output_tokens = sum(request.num_output_tokens for request in requests)
    num_prompt_tokens = sum(request.num_prompt_tokens for request in requests)
    summary: Summary = {
        "requests": len(requests),
        "duration_s": duration_s,
        "prompt_tokens": num_prompt_tokens,
        "output_tokens": num_output_tokens,
        "requests_per_s": len(requests) / duration_s,
        "output_tokens_per_s": num_output_tokens / duration_s,
        "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / duration_s,
    }
    answered = [request for request in requests if request.arrivals_s]
    summary |= distribution("ttft_ms", [request.ttft_s * 1e3 for request in answered])
    summary |= distribution("tpot_ms", [r.tpot_s * 1e3 for r in answered if r.tpot_s is not None])
    summary |= distribution("itl_ms", [gap * 1e3 for request in answered for gap in request.itl_s])
    summary |= distribution("e2e_ms", [request.e2e_s * 1e3 for request in answered])
    return summary


def distribution(name: str, values: Sequence[float]) -> Summary:
    """Mean and percentiles under names such as `ttft_ms_p99`; empty where there are no values."""
    if not values:
        return {}
    return {f"{name}_mean": fmean(values)} | {f"{name}_p{p}": percentile(values, p) for p in PERCENTILES}
