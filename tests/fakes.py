"""`FakeEngine`: an `EngineClient` without a model, which answers from a script, and its small tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxserve.engine.client import EngineHealth, EngineState, ModelInfo
from jaxserve.errors import InvalidRequestError, PromptTooLongError, RequestError
from jaxserve.outputs import CompletionOutput, FinishReason, RequestOutput, TokenLogprobs
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer.tokenizer import Tokenizer
from jaxserve.tokenizer.tokenizer_files import TokenizerFiles

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today? I am fine, thank you.",
    "One two three four five six seven eight nine ten. This is a small text for a small tokenizer.",
    "system user assistant You are a helpful assistant. What is the capital of France? Paris.",
]


def small_tokenizer(*, adds_bos: bool = False, chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """Train a byte-level BPE tokenizer of a few hundred tokens; every byte has one, so any text survives."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return Tokenizer(
        TokenizerFiles(
            name="small",
            backend=backend,
            special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
            chat_template=chat_template,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One `generate` call, as the engine received it."""

    prompt: str | list[int]
    params: SamplingParams
    request_id: str
    priority: int
    cache_salt: str | None
    add_special_tokens: bool


@dataclass
class FakeEngine:
    """Answers every prompt with `answer`, one token a step, `step_s` seconds apart.

    `error` is raised after `error_after` outputs. Sequence i of n says the answer with its number in front.
    """

    answer: str = "Hello world, how are you today?"
    tokenizer: Tokenizer = field(default_factory=small_tokenizer)
    step_s: float = 0.0
    error: RequestError | Exception | None = None
    error_after: int = 0
    health: EngineHealth = field(default_factory=lambda: EngineHealth(state=EngineState.READY))
    max_model_len: int = 1024
    max_queued_requests: int = 1024
    num_cached_tokens: int = 0
    scores_prompt_late: bool = False  # prompt_logprobs come with the last output, not the first
    default_sampling: dict[str, float | int] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)  # iterators closed before their end, and `abort` calls
    running: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._told_to_abort: set[str] = set()
        self.model_info = ModelInfo(
            served_names=("fake", "org/fake-alias"),
            root="/models/fake",
            max_model_len=self.max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            max_queued_requests=self.max_queued_requests,
            created_s=1_700_000_000,
            fingerprint="fp_fake",
            default_sampling=self.default_sampling,
        )

    async def abort(self, request_id: str) -> None:
        """Make the request end at its next step."""
        self._told_to_abort.add(request_id)

    async def generate(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the scripted answer in the way `params.output_kind` asks for."""
        self.calls.append(
            Call(
                prompt=prompt,
                params=params,
                request_id=request_id,
                priority=priority,
                cache_salt=cache_salt,
                add_special_tokens=add_special_tokens,
            )
        )
        prompt_token_ids = self._prompt_token_ids(prompt, params, add_special_tokens)
        run = _Run(self, prompt if isinstance(prompt, str) else None, prompt_token_ids, params, request_id)
        self.running.add(request_id)
        try:
            async for output in run.outputs():
                yield output
            request_id = ""
        finally:
            self.running.discard(run.request_id)
            if request_id and self.error is None:
                self.aborted.append(request_id)

    def is_told_to_abort(self, request_id: str) -> bool:
        """Return True after `abort`."""
        return request_id in self._told_to_abort

    def _prompt_token_ids(self, prompt: str | list[int], params: SamplingParams, add_special_tokens: bool) -> list[int]:
        params.validate()
        params.validate_token_ids(self.tokenizer.vocab_size)
        token_ids = self.tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        if params.truncate_prompt_tokens is not None:
            token_ids = token_ids[-params.truncate_prompt_tokens :]
        if not token_ids:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        if len(token_ids) + (params.max_tokens or 1) > self.max_model_len:
            raise PromptTooLongError(
                f"prompt has {len(token_ids)} tokens, model takes {self.max_model_len}; shorten it or lower max_tokens"
            )
        return token_ids


class _Run:
    """One request's way through the script."""

    def __init__(
        self,
        engine: FakeEngine,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self._engine = engine
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._sequences = [self._sequence(index) for index in range(params.n)]

    async def outputs(self) -> AsyncIterator[RequestOutput]:
        """Yield an output a step."""
        engine = self._engine
        num_steps = max(len(sequence) for sequence in self._sequences)
        for step in range(1, num_steps + 1):
            if engine.error is not None and step > engine.error_after:
                raise engine.error
            await asyncio.sleep(engine.step_s)
            aborted = engine.is_told_to_abort(self.request_id)
            if self._params.output_kind == "delta":
                news = [
                    self._output(i, step - 1, step, aborted) for i, s in enumerate(self._sequences) if step <= len(s)
                ]
                yield self._request_output(news, finished=aborted or step == num_steps)
            elif aborted or step == num_steps or self._params.output_kind == "cumulative":
                whole = [self._output(i, 0, min(step, len(s)), aborted) for i, s in enumerate(self._sequences)]
                yield self._request_output(whole, finished=aborted or step == num_steps)
            if aborted:
                return

    def _sequence(self, index: int) -> list[int]:
        text = self._engine.answer if self._params.n == 1 else f"{index}: {self._engine.answer}"
        return self._engine.tokenizer.encode(text, False)[: self._params.max_tokens]

    def _request_output(self, outputs: list[CompletionOutput], *, finished: bool) -> RequestOutput:
        is_aborted = any(output.finish_reason is FinishReason.ABORT for output in outputs)
        is_scored = (finished and not is_aborted) or not self._engine.scores_prompt_late
        wants_prompt = self._params.prompt_logprobs is not None and is_scored
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=outputs,
            finished=finished,
            prompt_logprobs=self._prompt_logprobs() if wants_prompt else None,
            num_cached_tokens=self._engine.num_cached_tokens,
        )

    def _prompt_logprobs(self) -> list[TokenLogprobs | None]:
        num_top = self._params.prompt_logprobs or 0
        rest = [self._logprobs(token_id, num_top) for token_id in self._prompt_token_ids[1:]]
        return [None, *rest]

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        """The token itself at -0.25, then the vocabulary in order at -1, -2, ..."""
        others = [other for other in range(4, 4 + num_top) if other != token_id]
        top = [token_id, *others][:num_top]
        return TokenLogprobs(token_id, -0.25, 1, top, [-0.25, *(-float(i) for i in range(1, num_top))][:num_top])

    def _output(self, index: int, begin: int, end: int, aborted: bool) -> CompletionOutput:
        params, tokenizer = self._params, self._engine.tokenizer
        token_ids = self._sequences[index]
        texts = [tokenizer.decode([token_id]) for token_id in token_ids]
        reason = FinishReason.LENGTH if len(token_ids) == params.max_tokens else FinishReason.STOP
        is_last = end == len(token_ids)
        return CompletionOutput(
            index=index,
            text="".join(texts[begin:end]),
            token_ids=token_ids[begin:end],
            logprobs=None
            if params.logprobs is None
            else [self._logprobs(token_id, params.logprobs) for token_id in token_ids[begin:end]],
            finish_reason=FinishReason.ABORT if aborted else reason if is_last else None,
            seed=(params.seed or 7) + index,
            text_offsets=[len("".join(texts[:i])) for i in range(begin, end)],
        )
