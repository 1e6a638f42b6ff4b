"""Two and four hosts over loopback: the tokens of one process, the real openai client, and hosts that die or hang."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from jaxserve.config_parallel import ParallelSettings
from jaxserve.engine.core import EngineCore
from tests.checkpoints import save_random_llama
from tests.e2e.server import wait_for
from tests.e2e.tiny_model import write_tokenizer
from tests.harness import greedy, run, tiny_config, tokens
from tests.hosts.group import Group

pytestmark = pytest.mark.multihost

NUM_TOKENS = 16
PROMPTS = [[7], [5, 9, 200, 31, 18], list(range(3, 40)), list(range(3, 40)) + [77, 78]]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "adaptive": False}  # tokens are the same, more programs run
ANSWER_WITHIN_S = 10
RESTART_WITHIN_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A process that a signal ends or stops, and what clients are told."""

    name: str
    signal: int
    pid: Callable[[Group], int]
    words: str
    ends_the_command: bool = False  # which the test has to start again


SILENCE = f"was not heard for {ParallelSettings().heartbeat_timeout_s:g} s"
DEATHS = (  # each restart waits longer than the one before: those that wait for a command come last
    Death(
        name="a follower's engine is killed",
        signal=signal.SIGKILL,
        pid=lambda group: group.followers[1].engine().pid,
        words="the engine process of node rank 1 was killed by SIGKILL",
    ),
    Death(
        name="the leader's engine is killed",
        signal=signal.SIGKILL,
        pid=lambda group: group.leader.engine().pid,
        words="the engine process was killed by SIGKILL",
    ),
    Death(
        name="a follower's engine hangs",
        signal=signal.SIGSTOP,
        pid=lambda group: group.followers[1].engine().pid,
        words=f"the engine process of node rank 1 {SILENCE}",
    ),
    Death(
        name="a follower's command hangs",
        signal=signal.SIGSTOP,
        pid=lambda group: group.followers[1].process.pid,
        words=f"node rank 1 {SILENCE}",
        ends_the_command=True,
    ),
    Death(
        name="a follower's command is killed",
        signal=signal.SIGKILL,
        pid=lambda group: group.followers[1].process.pid,
        words="the engine process ",  # whichever is missed first, the command or its engine's part in a step
        ends_the_command=True,
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random_llama(
        tmp_path_factory.mktemp("hosts") / "model", num_hidden_layers=2, num_attention_heads=4, vocab_size=257
    )
    return write_tokenizer(folder)


@pytest.fixture(scope="module")
def wanted(model: Path) -> list[list[int]]:
    """What one process answers."""
    core = EngineCore(tiny_config(str(model), max_num_batched_tokens=16, token_buckets=(16,), max_num_seqs=2))
    answers = [tokens(deltas) for deltas in run(core, PROMPTS, greedy(NUM_TOKENS))]
    core.shutdown()
    return answers


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Group]:
    flags = ("--tensor-parallel-size", "2", "--speculative-config", json.dumps(DRAFTS))
    with Group(tmp_path_factory.mktemp("two"), model, 2, *flags) as group:
        yield group


def client(group: Group) -> OpenAI:
    return OpenAI(base_url=f"{group.leader.url}/v1", api_key="none", max_retries=0, timeout=60)


def answer(group: Group, prompt: list[int]) -> list[int]:
    """The greedy continuation's token ids, by the real client."""
    with client(group) as api:
        (model,) = api.models.list().data
        extra = {"ignore_eos": True, "return_token_ids": True}
        completion = api.completions.create(
            model=model.id, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, extra_body=extra
        )
    return completion.choices[0].model_dump()["token_ids"]


def answers(group: Group) -> list[list[int]]:
    """Those of all prompts, asked for at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(lambda prompt: answer(group, prompt), PROMPTS))


def keep_streaming(group: Group) -> tuple[str, float]:
    """Read long streams until one fails: how it failed, and when."""
    with client(group) as api:
        (model,) = api.models.list().data
        try:
            while True:
                stream = api.completions.create(
                    model=model.id, prompt=[9] * 8, max_tokens=110, temperature=0, stream=True, n=8,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                for _ in stream:
                    pass
        except openai.APIError as error:
            return str(error), time.monotonic()


def streams_cut_by(group: Group, harm: int, pid: int) -> list[str]:
    """Send a signal while clients stream; the errors they get, all of them in time."""
    with ThreadPoolExecutor(4) as threads:
        streams: list[Future[tuple[str, float]]] = [threads.submit(keep_streaming, group) for _ in range(4)]
        wait_for(lambda: group.leader.metric("num_requests_running") > 0, 30, "streams")
        time.sleep(0.3)
        begin_s = time.monotonic()
        os.kill(pid, harm)
        ends = [stream.result(60) for stream in streams]
    assert max(end_s for _, end_s in ends) - begin_s < ANSWER_WITHIN_S
    return [error for error, _ in ends]


def health(group: Group) -> int:
    return httpx.get(f"{group.leader.url}/health", timeout=10).status_code


def wait_until_ready(group: Group) -> None:
    wait_for(
        lambda: httpx.get(f"{group.leader.url}/ready", timeout=10).status_code == 200, RESTART_WITHIN_S, group.logs()
    )


def test_two_hosts_give_the_tokens_of_one_process(two_hosts, wanted):
    assert answers(two_hosts) == wanted
    assert two_hosts.leader.metric("compiles_after_ready_total") == 0


def test_seeds_logprobs_and_penalties_work_on_two_hosts(two_hosts):
    with client(two_hosts) as api:
        (model,) = api.models.list().data
        texts = set()
        for _ in range(2):
            completion = api.completions.create(
                model=model.id, prompt="abc", max_tokens=8, seed=3, logprobs=2, presence_penalty=0.5,
                extra_body={"prompt_logprobs": 1},
            )  # fmt: skip
            texts.add(completion.choices[0].text)
            assert completion.choices[0].logprobs is not None
    assert len(texts) == 1


def test_every_host_makes_the_same_masks(two_hosts):
    with client(two_hosts) as api:
        (model,) = api.models.list().data
        completion = api.completions.create(
            model=model.id, prompt="abc", max_tokens=30, seed=3, n=4,
            extra_body={"structured_outputs": {"regex": "([a-f]{3}[0-9] ){2,4}end"}},
        )  # fmt: skip
    texts = [choice.text for choice in completion.choices]
    assert [text for text in texts if not re.fullmatch("([a-f]{3}[0-9] ){2,4}end", text)] == []
    assert len(set(texts)) > 1


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.name)
def test_a_death_ends_all_streams_in_time_and_the_group_comes_back(two_hosts, wanted, death):
    """At the default heartbeat timeout. A stopped process still has its connections: only its silence tells."""
    errors = streams_cut_by(two_hosts, death.signal, death.pid(two_hosts))
    assert all(death.words in error for error in errors), errors
    assert health(two_hosts) == 503
    if death.ends_the_command:
        two_hosts.followers[1].kill()
        two_hosts.followers[1] = two_hosts.start_follower(1)
    wait_until_ready(two_hosts)
    assert health(two_hosts) == 200
    assert answers(two_hosts) == wanted


def test_all_hosts_end_with_the_leader(two_hosts):
    two_hosts.leader.terminate()
    assert two_hosts.leader.process.wait(20) == 0, two_hosts.logs()
    assert two_hosts.followers[1].process.wait(20) == 0, two_hosts.logs()
    assert "Traceback" not in two_hosts.followers[1].log.read_text()


def test_four_hosts_of_two_data_shards_give_the_tokens_of_one_process(tmp_path, model, wanted):
    with Group(tmp_path, model, 4, "--tensor-parallel-size", "2", "--data-parallel-size", "2") as group:
        assert answers(group) == wanted
        assert group.leader.metric("compiles_after_ready_total") == 0
