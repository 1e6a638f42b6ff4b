"""From the engine's outputs to whole (not streamed) answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from api.reply import Reply, Usage, finish_reason, prompt_text
from api.schemas.chat import ChatRequest
from api.schemas.completion import CompletionRequest
from jaxserve.outputs import CompletionOutput, RequestOutput


def completion_answer(reply: Reply, request: CompletionRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Return the body of a text completion; `outputs` has one entry a prompt."""
    usage = Usage()
    choices = []
    for prompt_index, output in enumerate(outputs):
        usage.add_prompt(output)
        for sequence in _in_order(output):
            if request.max_tokens == 0:  # with echo: the prompt alone was asked for
                sequence = without_tokens(sequence)
            usage.num_completion_tokens += len(sequence.token_ids)
            choices.append(_completion_choice(reply, request, prompt_index, output, sequence))
    return reply.head("text_completion") | {"choices": choices, "usage": usage.to_json()}


def chat_answer(reply: Reply, request: ChatRequest, output: RequestOutput) -> dict[str, Any]:
    """Return the body of a chat completion."""
    usage = Usage()
    usage.add_prompt(output)
    choices = []
    for sequence in _in_order(output):
        usage.num_completion_tokens += len(sequence.token_ids)
        choices.append(_chat_choice(reply, request, sequence))
    answer = reply.head("chat.completion") | {"choices": choices, "usage": usage.to_json()}
    if reply.with_token_ids:
        answer["prompt_token_ids"] = output.prompt_token_ids
    if request.prompt_logprobs is not None:
        answer["prompt_logprobs"] = reply.forms.prompt(output.prompt_logprobs or (), request.prompt_logprobs)
    return answer


def completion_logprobs(
    reply: Reply, sequence: CompletionOutput, num_top: int, first_offset: int
) -> dict[str, list[Any]]:
    """Return a completion's log-probabilities; `first_offset` is where the generated text begins."""
    offsets = [first_offset + offset for offset in sequence.text_offsets or ()]
    return reply.forms.completion(sequence.logprobs or (), sequence.token_ids, offsets, num_top)


def prompt_completion_logprobs(reply: Reply, output: RequestOutput, num_top: int, text: str) -> dict[str, list[Any]]:
    """Return an echoed prompt's log-probabilities in completions' form; `text` is the prompt as echoed."""
    offsets = reply.forms.prompt_offsets(output.prompt_token_ids, text)
    return reply.forms.completion(output.prompt_logprobs or (), output.prompt_token_ids, offsets, num_top)


def echoed_message(request: ChatRequest) -> str:
    """Return what `echo` puts before a chat's answer: the last message, when it is the assistant's too."""
    last = request.messages[-1]
    if not request.echo or last.role != "assistant":
        return ""
    content = last.for_template()["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def without_tokens(sequence: CompletionOutput) -> CompletionOutput:
    """Return the sequence as if nothing had been generated."""
    return replace(sequence, text="", token_ids=[], logprobs=None, text_offsets=None)


def end_fields(sequence: CompletionOutput) -> dict[str, Any]:
    """Return what a choice says at its end; the seed, sent again, gives the same answer."""
    return {
        "finish_reason": finish_reason(sequence),
        "stop_reason": sequence.stop_reason,
        "seed": sequence.seed,
    }


def _in_order(output: RequestOutput) -> list[CompletionOutput]:
    return sorted(output.outputs, key=lambda sequence: sequence.index)


def _completion_choice(
    reply: Reply, request: CompletionRequest, prompt_index: int, output: RequestOutput, sequence: CompletionOutput
) -> dict[str, Any]:
    text = prompt_text(output, reply) if request.echo else ""
    logprobs = None
    if request.logprobs is not None:
        logprobs = completion_logprobs(reply, sequence, request.logprobs, len(text))
        if request.echo:
            before = prompt_completion_logprobs(reply, output, request.logprobs, text)
            logprobs = {name: before[name] + logprobs[name] for name in logprobs}
    choice = {
        "index": reply.index(prompt_index, sequence),
        "text": text + sequence.text,
        "logprobs": logprobs,
    } | end_fields(sequence)
    if reply.with_token_ids:
        choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": sequence.token_ids}
    if request.prompt_logprobs is not None:
        choice["prompt_logprobs"] = reply.forms.prompt(output.prompt_logprobs or (), request.prompt_logprobs)
    return choice


def _chat_choice(reply: Reply, request: ChatRequest, sequence: CompletionOutput) -> dict[str, Any]:
    logprobs = None
    if request.logprobs:
        logprobs = reply.forms.chat(sequence.logprobs or (), request.top_logprobs or 0)
    choice = {
        "index": sequence.index,
        "message": {
            "role": "assistant",
            "content": echoed_message(request) + sequence.text,
            "refusal": None,
        },
        "logprobs": logprobs,
    } | end_fields(sequence)
    if reply.with_token_ids:
        choice["token_ids"] = sequence.token_ids
    return choice
