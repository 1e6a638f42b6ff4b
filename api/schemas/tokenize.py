"""The bodies of POST /tokenize (a prompt, or messages) and POST /detokenize, in vLLM's form."""

from __future__ import annotations

from typing import ClassVar

from api.schemas import unsupported
from api.schemas.base import RequestModel
from api.schemas.chat import ConversationFields


class TokenizePromptRequest(RequestModel):
    """Plain text to tokens."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ConversationFields):
    """A conversation to the tokens the model would see."""

    unsupported: ClassVar = unsupported.TOKENIZE

    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(RequestModel):
    """Tokens to text."""

    model: str | None = None
    tokens: list[int]
