"""`bench latency`: one batch of equal requests after the other, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxserve.bench.offline import OfflineEngine, config_for
from jaxserve.bench.report import Report
from jaxserve.bench.statistics import RequestTimes, summarize
from jaxserve.bench.workload import Workload
from jaxserve.config import Config


def measure_latency(
    config: Config,
    workload: Workload,
    *,
    batch_sizes: Sequence[int],
    num_iters: int,
    in_process: bool,
    on_progress: Callable[[str], None],
) -> Report:
    """Run `num_iters` batches of each size, prompts always new, and report their latencies."""
    results = []
    with OfflineEngine(config_for(config, max(batch_sizes)), in_process=in_process, on_progress=on_progress) as engine:
        workload.check_fits(engine.max_model_len)
        for batch_size in batch_sizes:
            times: list[RequestTimes] = []
            total_s = 0.0
            for iteration in range(num_iters + 1):
                seed = hash((workload.seed, batch_size, iteration))  # of integers: the same in every process
                batch = replace(workload, num_prompts=batch_size, seed=seed)
                batch_times, batch_s = engine.run(batch.requests(engine.vocab_size))
                if iteration > 0:  # the first one warms up
                    times, total_s = times + batch_times, total_s + batch_s
            results.append({"batch size": batch_size} | summarize(times, total_s))
    return Report(
        benchmark="offline latency",
        settings={"config": config.redacted(), "workload": workload.describe(), "num_iters": num_iters},
        results=results,
    )
