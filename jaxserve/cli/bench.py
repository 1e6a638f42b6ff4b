"""`jaxserve bench`: the benchmarks' flags; the measuring is in `jaxserve.bench`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from jaxserve.cli.flags import Launch, takes_config
from jaxserve.config import API_KEY_VARIABLE, FIELDS
from jaxserve.errors import ConfigError

app = typer.Typer(help="Measure throughput, latency, serving, and the engine's own time.", no_args_is_help=True)

NumPrompts = Annotated[int, typer.Option("--num-prompts", min=1, help="Requests a run.")]
InputLen = Annotated[str, typer.Option("--input-len", help="Prompt tokens: 128, or drawn from 16:256.")]
OutputLen = Annotated[str, typer.Option("--output-len", help="Tokens to generate: 128, or drawn from 16:256.")]
SharedPrefixLen = Annotated[
    int, typer.Option("--shared-prefix-len", min=0, help="First tokens of the prompt that all requests share.")
]


def _writable(path: str | None) -> str | None:
    if path is not None:
        from jaxserve.bench.report import check_json_path

        check_json_path(path)
    return path


Json = Annotated[
    str | None,
    typer.Option("--json", help="Write the result to this file.", metavar="FILE", callback=_writable),
]
EngineProcess = Annotated[
    bool, typer.Option("--engine-process", help="Run the engine in a process of its own, as the server does.")
]


@app.command("throughput")
@takes_config
def throughput(
    launch: Launch,
    num_prompts: NumPrompts = 64,
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    shared_prefix_len: SharedPrefixLen = 0,
    engine_process: EngineProcess = False,
    json_path: Json = None,
) -> None:
    """Give the engine all requests at once, without a server, and count tokens a second."""
    from jaxserve.bench.throughput import measure_throughput
    from jaxserve.bench.workload import LengthRange, Workload

    config = launch.load()
    workload = Workload(
        num_prompts=num_prompts,
        input_len=LengthRange.parse(input_len, "--input-len"),
        output_len=LengthRange.parse(output_len, "--output-len"),
        shared_prefix_len=shared_prefix_len,
        seed=config.model.seed,
    )
    show = _start_display(config.server.log_level)
    report = measure_throughput(config, workload, in_process=not engine_process, on_progress=show)
    report.finish(["prompts"], json_path)


@app.command("latency")
@takes_config
def latency(
    launch: Launch,
    batch_sizes: Annotated[str, typer.Option("--batch-size", help="Requests at once: 8, or several: 1,8.")] = "1",
    num_iters: Annotated[int, typer.Option("--num-iters", min=1, help="Batches of each size.")] = 5,
    input_len: InputLen = "32",
    output_len: OutputLen = "64",
    engine_process: EngineProcess = False,
    json_path: Json = None,
) -> None:
    """Run one batch after the other, without a server, and time them."""
    from jaxserve.bench.latency import measure_latency
    from jaxserve.bench.workload import LengthRange, Workload

    config = launch.load()
    sizes = _integers(batch_sizes, "--batch-size")
    workload = Workload(
        num_prompts=max(sizes),
        input_len=LengthRange.parse(input_len, "--input-len"),
        output_len=LengthRange.parse(output_len, "--output-len"),
        seed=config.model.seed,
    )
    report = measure_latency(
        config,
        workload,
        batch_sizes=sizes,
        num_iters=num_iters,
        in_process=not engine_process,
        on_progress=_start_display(config.server.log_level),
    )
    report.finish(["batch size"], json_path)


@app.command("serve")
@takes_config
def serve(
    launch: Launch,
    url: Annotated[str | None, typer.Option("--url", help="A running server, instead of starting one.")] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests at a time: 1,4,16; 'all' is all at once.")
    ] = "1,4,16",
    num_prompts: NumPrompts = 64,
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    shared_prefix_len: SharedPrefixLen = 0,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=16, help="Prompts are random token ids below this.")
    ] = 10000,
    json_path: Json = None,
) -> None:
    """Measure what users of a server see. With --url the server runs already, else one is started."""
    from jaxserve.bench.serving import Load, measure_server, measure_started_server, parse_concurrencies
    from jaxserve.bench.workload import LengthRange, Workload

    if (url is None) == launch.is_empty:
        raise ConfigError("give either a model or a launch file to start a server with, or --url of one that runs")
    workload = Workload(
        num_prompts=num_prompts,
        input_len=LengthRange.parse(input_len, "--input-len"),
        output_len=LengthRange.parse(output_len, "--output-len"),
        shared_prefix_len=shared_prefix_len,
        seed=launch.overrides.get("seed", FIELDS["seed"].info.default),
    )
    load = Load(workload, parse_concurrencies(concurrency, num_prompts), vocab_size)
    if url is None:
        report = measure_started_server(launch.load(), load)
    else:
        keys = launch.overrides.get("api_key") or [os.environ.get(API_KEY_VARIABLE)]
        report = measure_server(url, load, api_key=keys[0])
    report.finish(["concurrency"], json_path)


@app.command("speculative")
@takes_config
def speculative(
    launch: Launch,
    batch_sizes: Annotated[str, typer.Option("--batch-size", help="Requests at once: 8, or several: 1,8.")] = "1,4,16",
    num_iters: Annotated[int, typer.Option("--num-iters", min=1, help="Answers to each conversation.")] = 3,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Tokens to generate.")] = 64,
    json_path: Json = None,
) -> None:
    """Answer with and without drafts, side by side: texts that repeat their prompt, edits of it, and free ones."""
    from jaxserve.bench.speculative import COLUMNS, measure_speculative

    config = launch.load()
    report = measure_speculative(
        config,
        batch_sizes=_integers(batch_sizes, "--batch-size"),
        output_len=output_len,
        num_iters=num_iters,
        on_progress=_start_display(config.server.log_level),
    )
    report.finish(COLUMNS, json_path)


@app.command("step")
def step(
    num_running: Annotated[int, typer.Option("--num-running", min=1, help="Requests in every step.")] = 256,
    num_steps: Annotated[int, typer.Option("--num-steps", min=1, help="Steps to time.")] = 300,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Prompt tokens a request, at least.")] = 128,
    max_model_len: Annotated[int, typer.Option("--max-model-len", min=1, help="The model's context.")] = 131_072,
    json_path: Json = None,
) -> None:
    """Time the host's part of a step (planning, batch building, bookkeeping) with a model that answers at once."""
    from jaxserve.bench.step import measure_step

    report = measure_step(
        num_running=num_running, num_steps=num_steps, input_len=input_len, max_model_len=max_model_len
    )
    report.finish(["requests"], json_path)


def _integers(text: str, flag: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise ConfigError(f"{flag} must be numbers such as 1,8, got {text!r}")
    return values


def _start_display(log_level: str) -> Callable[[str], None]:
    from jaxserve.cli.serve import set_up_logging
    from jaxserve.cli.startup_display import StartupDisplay

    set_up_logging(log_level)
    return StartupDisplay().show
