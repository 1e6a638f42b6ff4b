"""`check_prompt`: refuses at the door what could never be computed."""

from __future__ import annotations

from jaxserve.cache.block_pool import BlockPool
from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.request import EngineRequest
from jaxserve.scheduler.settings import SchedulerSettings


def check_prompt(request: EngineRequest, settings: SchedulerSettings, pool: BlockPool) -> None:
    """Raise `InvalidRequestError` or `PromptTooLongError` unless the prompt fits the context and the pool."""
    num_tokens = len(request.prompt_token_ids)
    if not num_tokens:
        raise InvalidRequestError("the prompt must hold at least one token", param="prompt")
    if num_tokens >= settings.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {num_tokens} tokens; the model's context takes {settings.max_model_len}, and at "
            f"least one must be left for the answer; shorten the prompt or serve with a larger max_model_len"
        )
    num_blocks = -(-num_tokens // pool.block_size)
    if num_blocks > pool.num_usable:
        raise PromptTooLongError(
            f"the prompt has {num_tokens} tokens and needs {num_blocks} blocks of {pool.block_size} tokens, "
            f"the KV cache has {pool.num_usable}; shorten the prompt or give the KV cache more memory"
        )
