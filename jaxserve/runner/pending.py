"""`PendingStep`: a step under way on the device, and the one place where its results are waited for."""

from __future__ import annotations

from typing import Protocol

from jaxserve.scheduler.plan import StepResult


class PendingStep(Protocol):
    """A step that was dispatched."""

    def is_ready(self) -> bool:
        """Whether `result` would return without waiting."""
        ...

    def result(self) -> StepResult:
        """Wait for the device and fetch the tokens; the one place where the host waits."""
        ...
