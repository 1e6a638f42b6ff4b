"""`bench speculative`: the same conversations with and without drafts, side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxserve.bench.report import Report, shown
from jaxserve.config import Config
from jaxserve.engine.core import EngineCore
from jaxserve.errors import ConfigError
from jaxserve.llm import LLM
from jaxserve.sampling_params import SamplingParams

_TEXT = (
    "The lighthouse at Cape Morrow was built in 1873 by a team of forty workers who carried every stone up the cliff "
    "by hand. Its lamp burned whale oil for the first twelve years, then kerosene, and finally electricity after the "
    "storm of 1931. The last keeper, Edna Marsh, retired in 1974 and wrote a small book about the ships she had seen."
)
_CODE = (
    "def balance(values):\n    x = 0\n    for value in values:\n        if value > 0:\n            x = x + value\n"
    "        else:\n            x = x - value\n    print(x)\n    return x\n"
)
CONVERSATIONS = {
    "copy": [
        f"Repeat the following text exactly, word for word:\n\n{_TEXT}",
        f"Summarize this text and quote it:\n\n{_TEXT}",
    ],
    "edit": [
        f"Rewrite this code with the variable x renamed to total. Output only the code.\n\n{_CODE}",
        f"Turn this into JSON with the keys name, built, lamp, keeper:\n\n{_TEXT}",
    ],
    "free": ["Write a story about a dragon who learns to bake bread.", "Explain how a bicycle stays upright."],
}

COLUMNS = ("kind", "batch size", "plain tok/s", "tok/s", "speed-up", "drafts", "accepted", "same answers")


@dataclass(slots=True)
class _Engine:
    """An engine and what it has done of one kind and batch size."""

    llm: LLM
    core: EngineCore
    num_tokens: int = 0
    duration_s: float = 0.0
    answers: list[list[int]] = field(default_factory=list)

    def run(self, text: str, batch_size: int, params: SamplingParams) -> None:
        begin_s = time.perf_counter()
        outputs = self.llm.chat([[{"role": "user", "content": text}]] * batch_size, params, use_tqdm=False)
        self.duration_s += time.perf_counter() - begin_s
        self.answers += [output.outputs[0].token_ids for output in outputs]
        self.num_tokens += sum(map(len, self.answers[-batch_size:]))

    def start_anew(self) -> None:
        self.num_tokens, self.duration_s, self.answers = 0, 0.0, []


def measure_speculative(
    config: Config, *, batch_sizes: Sequence[int], output_len: int, num_iters: int, on_progress: Callable[[str], None]
) -> Report:
    """Greedy answers of `output_len` tokens to each kind of conversation, with drafts and without.

    Both are in memory together. The first answer of each warms up: later the prompts come from the prefix cache.
    """
    if config.speculative.speculative_config is None:
        raise ConfigError("bench speculative compares answers with drafts and without: give --speculative-config")
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    without = config.with_values(speculative_config=None)
    with _engine(without, on_progress) as plain, _engine(config, on_progress) as drafting:
        results = [
            _compare(kind, batch_size, num_iters, plain, drafting, params)
            for batch_size in batch_sizes
            for kind in CONVERSATIONS
        ]
    settings = {"config": config.redacted(), "output_len": output_len, "num_iters": num_iters}
    return Report(benchmark="speculative decoding", settings=settings, results=results)


def _compare(
    kind: str, batch_size: int, num_iters: int, plain: _Engine, drafting: _Engine, params: SamplingParams
) -> dict[str, str | int | float]:
    texts = CONVERSATIONS[kind]
    for text in texts:
        for engine in (plain, drafting):
            engine.run(text, batch_size, params)
    before = drafting.core.stats().drafts
    for engine in (plain, drafting):
        engine.start_anew()
    for text in texts * num_iters:
        for engine in (plain, drafting):
            engine.run(text, batch_size, params)
    after = drafting.core.stats().drafts
    rates = [engine.num_tokens / engine.duration_s for engine in (plain, drafting)]
    same = sum(a == b for a, b in zip(plain.answers, drafting.answers, strict=True))
    return {
        "kind": kind,
        "batch size": batch_size,
        "plain tok/s": shown(rates[0]),
        "tok/s": shown(rates[1]),
        "speed-up": shown(rates[1] / rates[0]),
        "drafts": after.num_draft_tokens - before.num_draft_tokens,
        "accepted": after.num_accepted_tokens - before.num_accepted_tokens,
        "same answers": f"{same} of {len(plain.answers)}",
    }


@contextmanager
def _engine(config: Config, on_progress: Callable[[str], None]) -> Iterator[_Engine]:
    core = EngineCore(config, on_progress=on_progress)
    with LLM(config=config, core=core) as llm:
        yield _Engine(llm, core)
