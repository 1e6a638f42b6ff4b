"""Parameters that OpenAI or vLLM know and this server cannot honour: which value asks for nothing, and what to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A parameter that is refused by name, unless its value is the one that changes nothing."""

    reason: str
    asks_nothing: Callable[[Any, Mapping[str, Any]], bool]  # of the value and the whole request


def _never(reason: str) -> Unsupported:
    return Unsupported(reason, lambda value, fields: False)


def _unless(reason: str, *neutral: object) -> Unsupported:
    # True == 1 in Python, so the type is compared too.
    return Unsupported(
        reason, lambda value, fields: any(type(value) is type(same) and value == same for same in neutral)
    )


def _equals_n(value: Any, fields: Mapping[str, Any]) -> bool:
    return type(value) is int and value == fields.get("n", 1)


def _needs_no_tools(tools: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    """Of a choice among `tools`: none is to be called, or there is none to choose."""
    return lambda value, fields: value == "none" or (value == "auto" and not fields.get(tools))


_NO_TOOLS = "this server does not call tools yet"
_NO_BEAMS = "this server samples; it has no beam search"
_NO_AUDIO = "this server takes and gives text only"

_SAMPLING = {
    "best_of": Unsupported("give it the value of n, or leave it out", _equals_n),
    "guided_decoding_backend": _unless("grammars are llguidance's; leave it out", "auto", "guidance"),
    "use_beam_search": _unless(_NO_BEAMS, False),
    "length_penalty": _unless(_NO_BEAMS, 1, 1.0),
    "early_stopping": _unless(_NO_BEAMS, False),
    "logprob_token_ids": _never("ask for the most likely tokens with logprobs"),
    "prompt_embeds": _never("send the prompt as text or token ids"),
    "logits_processors": _never("no code is taken from requests"),
    "repetition_detection": _never("use repetition_penalty or stop"),
    "thinking_token_budget": _never("this server does not tell thinking from answering yet"),
    "kv_transfer_params": _never("this server does not transfer KV caches"),
    "vllm_xargs": _never("there are no engine extensions"),
    "stream_interval": _unless("every step is sent", 1),
    "truncation_side": _unless("prompts are cut at their beginning", "left"),
    "store": _unless("answers are not kept", False),
    "service_tier": _unless("there is one service tier; use 'auto' or 'default'", "auto", "default"),
}

COMPLETION = _SAMPLING | {"suffix": _unless("this server does not fill in the middle", "")}

CHAT = _SAMPLING | {
    "tools": _unless(_NO_TOOLS, []),
    "tool_choice": Unsupported(f"{_NO_TOOLS}; only 'none' and 'auto' are taken", _needs_no_tools("tools")),
    "functions": _unless(_NO_TOOLS, []),
    "function_call": Unsupported(f"{_NO_TOOLS}; only 'none' and 'auto' are taken", _needs_no_tools("functions")),
    "chat_template": _never("templates are not taken from requests; start the server with --chat-template"),
    "modalities": _unless(f"{_NO_AUDIO}; only ['text'] is taken", ["text"]),
    "audio": _never(_NO_AUDIO),
    "prediction": _never("predicted outputs are not used"),
    "web_search_options": _never("this server does not search the web"),
    "mm_processor_kwargs": _never(_NO_AUDIO),
    "media_io_kwargs": _never(_NO_AUDIO),
    "include_reasoning": _unless("this server does not tell thinking from answering yet", True),
    "verbosity": _unless("ask for it in the messages", "medium"),
}

TOKENIZE = {name: CHAT[name] for name in ("tools", "chat_template", "mm_processor_kwargs", "media_io_kwargs")}
