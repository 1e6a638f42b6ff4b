"""`LLM`: offline generation with the engine in this process; `LLM(model=...).generate(prompts, params)`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypedDict, TypeGuard

from tqdm import tqdm

from jaxserve.config import Config, load_config
from jaxserve.engine.inprocess import InProcessEngine
from jaxserve.engine.preparation import load_tokenizer
from jaxserve.engine.process import Core
from jaxserve.errors import ChatTemplateError, EngineDeadError, InvalidRequestError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.chat_template import ChatTemplate
from jaxserve.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class TextPrompt(TypedDict):
    """A prompt as text, in vLLM's spelling."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, in vLLM's spelling."""

    prompt_token_ids: list[int]


Prompt = str | list[int] | TextPrompt | TokensPrompt
Messages = list[dict[str, Any]]


class LLM:
    """A model in this process, for batches. Close it, or use it in a `with`, to give the device back."""

    def __init__(
        self, model: str | None = None, *, config: Config | None = None, core: Core | None = None, **settings: Any
    ) -> None:
        """Load the model: by its name and any settings of `Config` by their flat names, or by a whole `config`.

        `core` takes an engine core that is ready, instead of starting one.
        """
        if config is None:
            config = load_config(None, settings if model is None else {"model": model, **settings})
        elif model is not None or settings:
            config = config.with_values(**settings, **({} if model is None else {"model": model}))
        self.config = config
        self.tokenizer = load_tokenizer(config.model)
        path = config.model.chat_template
        self._chat_template = None if path is None else ChatTemplate.of_tokenizer(self.tokenizer, path=Path(path))
        self._engine: InProcessEngine | None = InProcessEngine(config, core or _start_core(config), self.tokenizer)
        self._default_params = _default_params(self._engine.core_info.default_sampling)
        self._request_ids = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which is also `tokenizer`."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses where no parameters are given: the model's generation_config.json."""
        return self._default_params

    def close(self) -> None:
        """End the engine and let go of its memory. May be called twice."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    def reset_prefix_cache(self) -> bool:
        """Let no new request find the cached blocks; False without a prefix cache."""
        return self._open_engine().reset_prefix_cache()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        add_special_tokens: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts; answers come in their order.

        A prompt is text, a list of token ids, `{"prompt": text}` or `{"prompt_token_ids": token ids}`. One
        `SamplingParams` serves all prompts, a list has one for each. All requests are checked before any runs.
        """
        engine = self._open_engine()
        batch = _as_prompts(prompts)
        params = self._as_params(sampling_params, len(batch))
        if priority is not None and len(priority) != len(batch):
            raise InvalidRequestError(f"there are {len(batch)} prompts, but {len(priority)} priorities")
        requests = [
            engine.preparer.prepare(
                prompt,
                replace(params[i], output_kind="final_only"),
                request_id=str(next(self._request_ids)),
                priority=priority[i] if priority is not None else 0,
                add_special_tokens=add_special_tokens,
            )
            for i, prompt in enumerate(batch)
        ]
        with tqdm(total=len(requests), desc="Prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            return engine.run(requests, on_finished=lambda _: bar.update())

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; `chat_template` is a Jinja template in place of the model's."""
        template = self._template() if chat_template is None else self._own_template(chat_template)
        conversations = [messages] if _is_conversation(messages) else messages
        prompts = [
            template.render(
                conversation,  # type: ignore[arg-type]  _is_conversation has told them apart
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                extra=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        # The template writes the special tokens itself.
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, add_special_tokens=False)

    def _open_engine(self) -> InProcessEngine:
        if self._engine is None:
            raise EngineDeadError("this LLM is closed")
        return self._engine

    def _as_params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self._default_params
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * num_prompts
        if len(sampling_params) != num_prompts:
            raise InvalidRequestError(f"there are {num_prompts} prompts, but {len(sampling_params)} sampling_params")
        return list(sampling_params)

    def _template(self) -> ChatTemplate:
        if self._chat_template is None:
            template = ChatTemplate.of_tokenizer(self.tokenizer)
            if template is None:
                raise ChatTemplateError("the model has no chat template; pass chat_template, or use generate")
            self._chat_template = template
        return self._chat_template

    def _own_template(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, special_tokens=self.tokenizer.special_tokens)


def _start_core(config: Config) -> Core:
    from jaxserve.engine.core import EngineCore

    return EngineCore(config, on_progress=lambda text: logger.info("engine: %s", text))


def _default_params(default_sampling: dict[str, float | int]) -> SamplingParams:
    values: dict[str, Any] = dict(default_sampling)
    return SamplingParams(**values)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """A list of prompts from one prompt or several; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)) or (_is_list(prompts) and prompts and all(map(_is_integer, prompts))):
        return [_as_prompt(prompts)]
    if not _is_list(prompts):
        raise InvalidRequestError(f"prompts must be {_PROMPT_FORMS}, or a list of such, got {_type_name(prompts)}")
    return [_as_prompt(prompt) for prompt in prompts]


def _as_prompt(prompt: object) -> str | list[int]:
    """A prompt as text or as tokens, from any of its forms."""
    if isinstance(prompt, Mapping):
        if prompt.keys() not in ({"prompt"}, {"prompt_token_ids"}):
            raise InvalidRequestError(
                "a prompt that is a dict must have the key 'prompt' or 'prompt_token_ids' and no other, got "
                f"{', '.join(map(repr, prompt)) or 'none'}",
                param="prompt",
            )
        ((key, value),) = prompt.items()
        if isinstance(value, str) != (key == "prompt"):
            wanted = "text" if key == "prompt" else "a list of token ids"
            raise InvalidRequestError(f"{key!r} of a prompt must be {wanted}, got {_type_name(value)}", param="prompt")
        prompt = value
    if isinstance(prompt, str):
        return prompt
    if not _is_list(prompt):
        raise InvalidRequestError(f"a prompt must be {_PROMPT_FORMS}, got {_type_name(prompt)}", param="prompt")
    return list(prompt)


_PROMPT_FORMS = "text, a list of token ids, {'prompt': text} or {'prompt_token_ids': token ids}"


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_integer(value: object) -> bool:
    return isinstance(value, int)


def _type_name(value: object) -> str:
    return type(value).__name__


def _is_conversation(messages: Messages | Sequence[Messages]) -> bool:
    return not messages or isinstance(messages[0], Mapping)
