"""`ReplicaCore`: a follower's engine core, which runs the leader's steps on this host's devices."""

from __future__ import annotations

from jaxserve.config import Config
from jaxserve.engine.assembly import OnProgress
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.engine.hosts.plans import FollowingHosts
from jaxserve.engine.startup import start
from jaxserve.outputs import TokenDelta
from jaxserve.request import EngineRequest
from jaxserve.runner.pending import PendingStep

PLAN_POLL_MS = 100  # how long to wait for a plan before looking for other messages


class ReplicaCore:
    """Has requests of nobody: it keeps no more of them than the runner's own slots."""

    def __init__(self, config: Config, *, on_progress: OnProgress, hosts: FollowingHosts) -> None:
        """Load and compile beside the leader: ready afterwards."""
        started = start(config, on_progress, hosts)
        self.info: CoreInfo = started.info
        self._runner = started.runner
        self._guard = started.guard
        self._hosts = hosts
        self._in_flight: list[PendingStep] = []

    @property
    def has_unfinished(self) -> bool:
        """Always: a plan may come at any time."""
        return True

    def step(self) -> list[TokenDelta]:
        """Dispatch the next plan, then wait for the step before it, so that what fails is seen."""
        plan = self._hosts.receive_plan(PLAN_POLL_MS)
        if plan is not None:
            with self._guard.watch():
                self._in_flight.append(self._runner.dispatch(plan))
        while len(self._in_flight) > (0 if plan is None else 1):
            self._in_flight.pop(0).result()
        return []

    def stats(self) -> EngineStats:
        """Compiles alone: the leader counts the rest."""
        return EngineStats(num_compiles_after_ready=self._guard.num_compiles)

    def add_request(self, request: EngineRequest) -> None:
        """Never called: requests go to the leader."""
        raise AssertionError("a follower takes no requests")

    def abort(self, request_ids: list[str]) -> list[TokenDelta]:
        """Nothing to end."""
        return []

    def reset_prefix_cache(self) -> bool:
        """Nothing is cached here: block tables come with the plans."""
        return False

    def shutdown(self) -> None:
        """End, whatever is in flight: the leader may be gone, and its part of a step with it."""
        self._guard.disarm()
        self._hosts.close()
