"""`jaxserve chat` and `jaxserve complete`: talk to a running server through the openai package, streaming."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.config import API_KEY_VARIABLE
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

DEFAULT_URL = "http://127.0.0.1:8000/v1"
PROMPT = "> "

Url = Annotated[str, typer.Option("--url", help="The server's address, with /v1.")]
ModelName = Annotated[str | None, typer.Option("--model-name", help="Model to ask. [the server's first]")]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Key to send.", envvar=API_KEY_VARIABLE)]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, help="Tokens an answer at most.")]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, help="0 is greedy. [the model's]")]


def chat(
    url: Url = DEFAULT_URL,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="Comes before the talk.")] = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Ask this alone, then end.")] = None,
) -> None:
    """Chat with a running server. Ctrl-C stops an answer, Ctrl-D ends."""
    with _server_errors(url):
        client, model = _connect(url, model_name, api_key)
        messages: list[ChatCompletionMessageParam] = []
        if system_prompt is not None:
            messages.append({"role": "system", "content": system_prompt})
        for question in [quick] if quick is not None else _typed_lines():
            messages.append({"role": "user", "content": question})
            chunks = client.chat.completions.create(
                model=model, messages=messages, stream=True, max_completion_tokens=max_tokens, temperature=temperature
            )
            answer = _show(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            messages.append({"role": "assistant", "content": answer})


def complete(
    url: Url = DEFAULT_URL,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    quick: Annotated[str | None, typer.Option("--quick", "-q", help="Continue this alone, then end.")] = None,
) -> None:
    """Let a running server continue text. Ctrl-C stops an answer, Ctrl-D ends."""
    with _server_errors(url):
        client, model = _connect(url, model_name, api_key)
        for text in [quick] if quick is not None else _typed_lines():
            chunks = client.completions.create(
                model=model, prompt=text, stream=True, max_tokens=max_tokens, temperature=temperature
            )
            _show(chunk.choices[0].text for chunk in chunks if chunk.choices)


def _connect(url: str, model_name: str | None, api_key: str | None) -> tuple[OpenAI, str]:
    """A client, and the model to ask."""
    from openai import OpenAI  # takes half a second to import

    client = OpenAI(base_url=url, api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none")
    return client, model_name or client.models.list().data[0].id


def _typed_lines() -> Iterator[str]:
    """Lines from the keyboard (or a pipe), empty ones left out."""
    while True:
        try:
            line = input(PROMPT if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _show(pieces: Iterable[str]) -> str:
    """Print an answer as it comes; Ctrl-C ends it. Returns what was printed."""
    shown: list[str] = []
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            shown.append(piece)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(shown)


@contextmanager
def _server_errors(url: str) -> Iterator[None]:
    """Turn what the openai client raises into one line."""
    import openai

    try:
        yield
    except openai.APIConnectionError as error:
        raise JaxserveError(f"no server answers at {url} ({error}); start one with 'jaxserve serve'") from error
    except openai.APIStatusError as error:
        raise JaxserveError(f"the server answered with HTTP {error.status_code}: {error.message}") from error
    except openai.APIError as error:
        raise JaxserveError(f"the server sent an error: {error.message}") from error
