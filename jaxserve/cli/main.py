"""The `jaxserve` command: which subcommands there are, and how errors end it."""

from __future__ import annotations

import sys

import typer

from jaxserve.cli import bench, chat, deploy, environment, plan, serve, show_config
from jaxserve.cli.flags import ConfigCommand, takes_config
from jaxserve.errors import CheckpointError, ConfigError, JaxserveError, PromptTooLongError, TokenizerError

EXIT_USER_ERROR = 2  # as for a wrong flag
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="jaxserve",
    help="Serve language models with JAX: an OpenAI-compatible server and its tools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags short on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve", cls=ConfigCommand)(takes_config(serve.serve))
app.command("deploy", cls=ConfigCommand)(takes_config(deploy.deploy))
app.command("chat")(chat.chat)
app.command("complete")(chat.complete)
app.command("config", cls=ConfigCommand)(takes_config(show_config.show_config))
app.command("plan", cls=ConfigCommand)(takes_config(plan.plan))
app.command("collect-env")(environment.collect_env)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; a `JaxserveError` becomes one line on stderr."""
    try:
        app()
    except (ConfigError, CheckpointError, TokenizerError, PromptTooLongError) as error:
        _end(error, EXIT_USER_ERROR)
    except JaxserveError as error:
        _end(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _end(error: JaxserveError, code: int) -> None:
    text = " ".join(str(error).split())
    print(f"jaxserve: error: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
