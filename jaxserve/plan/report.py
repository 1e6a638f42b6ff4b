"""A plan for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxserve.plan.compiled import Confirmation
from jaxserve.plan.deployment import Deployment
from jaxserve.plan.memory import Memory
from jaxserve.plan.roofline import Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a plan says. Bytes are those of one device."""

    deployment: Deployment
    memory: Memory
    rates: Sequence[Rate]
    confirmation: Confirmation | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        parallel, devices = self.deployment.config.parallel, self.deployment.devices
        data: dict[str, Any] = {
            "model": self.deployment.config.model.model,
            "devices": str(devices),
            "tensor_parallel_size": parallel.tensor_parallel_size,
            "data_parallel_size": parallel.data_parallel_size,
            "num_idle_devices": self._num_idle,
            "drafts": self._drafts,
            "num_layers": self.deployment.graph.config.num_layers,
            "dtype": self.deployment.files.dtype.name,
            "attention": self.deployment.graph.backend.implementation,
            "memory": _memory_data(self.memory),
            "collectives": self.deployment.num_collectives(),
            "roofline": [dataclasses.asdict(rate) for rate in self.rates],
        }
        if self.confirmation is not None:
            data["compiled"] = {
                "memory": _memory_data(self.confirmation.memory),
                "weight_bytes": self.confirmation.weight_bytes,
                "pool_bytes": self.confirmation.pool_bytes,
                "collectives": self.confirmation.collectives,
            }
        return data

    def print_table(self) -> None:
        """Print it, a fact a line, and a line a rate."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left", show_header=False)
        for name, value in self._facts().items():
            table.add_row(name, value)
        rates = Table(title="Roofline: no program is faster", title_justify="left")
        for column in ("phase", "requests", "tokens each", "step ms", "tokens/s", "bound by"):
            rates.add_column(column, justify="left" if column in ("phase", "bound by") else "right")
        for rate in self.rates:
            rates.add_row(
                rate.phase,
                f"{rate.batch_size}",
                f"{rate.context:,}",
                f"{rate.step_ms:.2f}",
                f"{rate.tokens_per_s:,.0f}",
                rate.bound,
            )
        console = Console()
        console.print(table)
        console.print(rates)

    @property
    def _drafts(self) -> str | None:
        """What drafts, where it takes memory."""
        speculative = self.deployment.config.speculative.speculative_config
        if speculative is None or len(self.deployment.models) == 1:
            return None
        return " ".join(filter(None, (speculative.method, speculative.model)))

    @property
    def _num_idle(self) -> int:
        return self.deployment.devices.count - self.deployment.graph.mesh.size

    def _title(self) -> str:
        parallel, devices = self.deployment.config.parallel, self.deployment.devices
        idle = f", {self._num_idle} of them idle" if self._num_idle else ""
        return (
            f"{self.deployment.config.model.model} on {devices}{idle}; tensor parallel "
            f"{parallel.tensor_parallel_size}, data parallel {parallel.data_parallel_size}"
        )

    def _facts(self) -> Mapping[str, str]:
        memory, collectives = self.memory, self.deployment.num_collectives()
        drafts = {"drafts": f"{self._drafts}: in all bytes, but not in collectives and rates"} if self._drafts else {}
        facts = {
            **drafts,
            "dtype, attention": f"{self.deployment.files.dtype.name}, {self.deployment.graph.backend.implementation}",
            "a device may use": _gib(memory.limit_bytes),
            "weights a device": _gib(memory.weight_bytes),
            "KV pool a device": f"{_gib(memory.pool_bytes)}, {memory.num_blocks:,} blocks of {memory.block_size}",
            "activations a device": f"{_gib(memory.step_bytes)} (estimate)",
            "cached tokens": f"{memory.num_cached_tokens:,} on all devices",
            "requests at once": f"{memory.num_full_requests} of {memory.max_model_len:,} tokens (max_model_len)",
            "collectives a step": f"{collectives['forward']}, and of the sampler "
            + ", ".join(f"{count} ({variant})" for variant, count in collectives["sampler"].items()),
        }
        if (confirmed := self.confirmation) is not None:
            facts |= {
                "compiled: weights": _gib(confirmed.weight_bytes),
                "compiled: KV pool": f"{_gib(confirmed.pool_bytes)}, {confirmed.memory.num_blocks:,} blocks",
                "compiled: activations": _gib(confirmed.memory.step_bytes),
                "compiled: collectives": "; ".join(
                    f"{name}: {', '.join(f'{count} {kind}' for kind, count in found.items()) or 'none'}"
                    for name, found in confirmed.collectives.items()
                ),
            }
        return facts


def _memory_data(memory: Memory) -> dict[str, Any]:
    return dataclasses.asdict(memory) | {
        "num_cached_tokens": memory.num_cached_tokens,
        "num_full_requests": memory.num_full_requests,
    }


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
