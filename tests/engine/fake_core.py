"""`FakeCore`: a small deterministic engine core for the tests of everything around it; its prompts are its script.

The answer to a prompt is the prompt again, from its first token, over and over (`expected_tokens`).
A prompt that begins with a command token makes it misbehave; `config.model.hf_overrides` scripts its start.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxserve.config import Config
from jaxserve.engine.core_facts import CoreInfo, EngineStats
from jaxserve.engine.side_by_side import side_by_side
from jaxserve.errors import CheckpointError, QueueFullError
from jaxserve.outputs import FinishReason, TokenDelta, TokenLogprobs
from jaxserve.request import EngineRequest

VOCAB_SIZE = 300
MAX_MODEL_LEN = 2048
CRASH, KILL, FAIL_ROW, REJECT = 290, 291, 292, 293  # as a prompt's first token
GATED_TOKENS = 3


class FakeCore:
    """Generates one token a step for every request."""

    def __init__(self, config: Config, *, on_progress: Callable[[str], None] | None = None) -> None:
        script = config.model.hf_overrides
        assert on_progress is not None
        assert not config.server.api_key, "keys have no business in the engine process"
        on_progress("loading the fake")
        if "start_s" in script:
            time.sleep(script["start_s"])
        if script.get("start") == "checkpoint_error":
            raise CheckpointError("the fake checkpoint is broken")
        if script.get("start") == "in_threads":
            side_by_side(lambda _: time.sleep(60), lambda _: time.sleep(60))
        if script.get("start") == "bug":
            raise KeyError("a bug in the core")
        if script.get("start") == "kill" and os.path.exists(script["unless"]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.info = CoreInfo(
            max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, num_blocks=100, block_size=16, fingerprint="fp_fake"
        )
        if os.path.exists(script.get("info", "")):
            self.info = replace(self.info, **json.loads(Path(script["info"]).read_text()))
        self._step_s = script.get("step_s", 0.001)
        self._record = script.get("record")  # file that gets a line for each abort
        self._gate = script.get("gate")  # file without which no request gets more than GATED_TOKENS tokens
        self._requests: dict[str, EngineRequest] = {}
        self._outputs: dict[str, list[int]] = {}
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add_request(self, request: EngineRequest) -> None:
        if request.prompt_token_ids[0] == REJECT and request.request_id.endswith(("-0", "-1")) is False:
            raise QueueFullError("the fake queue is full", retry_after_s=7)
        self._requests[request.request_id] = request
        self._outputs[request.request_id] = []

    def abort(self, request_ids: list[str]) -> list[TokenDelta]:
        deltas = []
        for name in request_ids:
            if self._requests.pop(name, None) is not None:
                num_tokens = len(self._outputs.pop(name))
                deltas.append(TokenDelta(name, finish_reason=FinishReason.ABORT))
                if self._record:
                    with open(self._record, "a") as file:
                        file.write(f"{name} {num_tokens}\n")
        return deltas

    def step(self) -> list[TokenDelta]:
        time.sleep(self._step_s)
        self._num_steps += 1
        is_open = self._gate is None or os.path.exists(self._gate)
        return [
            self._advance(request)
            for name, request in list(self._requests.items())
            if is_open or len(self._outputs[name]) < GATED_TOKENS
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._requests),
            kv_cache_usage=len(self._requests) / 100,
            num_steps=self._num_steps,
            num_computed_tokens=3 * self._num_steps,
        )

    def reset_prefix_cache(self) -> bool:
        return not self._requests

    def shutdown(self) -> None:
        if self._record:
            with open(self._record, "a") as file:
                file.write("shutdown\n")

    def _advance(self, request: EngineRequest) -> TokenDelta:
        command = request.prompt_token_ids[0]
        output = self._outputs[request.request_id]
        if command == CRASH and len(output) == 3:
            raise RuntimeError("scripted crash")
        if command == KILL and len(output) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if command == FAIL_ROW and len(output) == 3:
            return self._finish(request, TokenDelta(request.request_id, error="nan in the logits"), FinishReason.ERROR)
        params = request.sampling_params
        token_id = request.prompt_token_ids[len(output) % len(request.prompt_token_ids)]
        delta = TokenDelta(request.request_id, [token_id])
        if params.logprobs is not None:
            delta.logprobs = [
                TokenLogprobs(token_id, -0.5, 1, [token_id][: params.logprobs], [-0.5][: params.logprobs])
            ]
        if not output:
            delta.num_cached_tokens, delta.queued_s = 0, 0.001
            if params.prompt_logprobs is not None:
                rest = [TokenLogprobs(t, -1.0, 2, [], []) for t in request.prompt_token_ids[1:]]
                delta.prompt_logprobs = [None, *rest]
        output.append(token_id)
        is_stop = token_id in (params.stop_token_ids or ()) or token_id in request.eos_token_ids
        if is_stop and len(output) > params.min_tokens:
            delta.stop_token_id = token_id
            return self._finish(request, delta, FinishReason.STOP)
        if len(output) == params.max_tokens:
            return self._finish(request, delta, FinishReason.LENGTH)
        return delta

    def _finish(self, request: EngineRequest, delta: TokenDelta, reason: FinishReason) -> TokenDelta:
        delta.finish_reason = reason
        del self._requests[request.request_id], self._outputs[request.request_id]
        return delta


def expected_tokens(prompt: list[int], num_tokens: int) -> list[int]:
    """What `FakeCore` answers."""
    return [prompt[i % len(prompt)] for i in range(num_tokens)]
