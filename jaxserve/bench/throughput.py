"""`bench throughput`: all requests at once, as many tokens a second as the engine makes of them."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.bench.offline import OfflineEngine, config_for
from jaxserve.bench.report import Report
from jaxserve.bench.statistics import summarize
from jaxserve.bench.workload import Workload
from jaxserve.config import Config


def measure_throughput(
    config: Config, workload: Workload, *, in_process: bool, on_progress: Callable[[str], None]
) -> Report:
    """Bring an engine up, run the workload once, and report tokens a second."""
    with OfflineEngine(
        config_for(config, workload.num_prompts), in_process=in_process, on_progress=on_progress
    ) as engine:
        workload.check_fits(engine.max_model_len)
        times, duration_s = engine.run(workload.requests(engine.vocab_size))
    return Report(
        benchmark="offline throughput",
        settings={"config": config.redacted(), "workload": workload.describe(), "in_process": in_process},
        results=[{"prompts": workload.num_prompts} | summarize(times, duration_s)],
    )
