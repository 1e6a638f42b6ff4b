"""`OutputProcessor`: one request's token deltas become text, stop strings take effect, and `RequestOutput`s come out.

Nothing is queued: deltas are merged into the sequences as they arrive, and `take()` hands over what is new since the
last time. A slow reader gets fewer and larger outputs.
"""

from __future__ import annotations

from jaxserve.engine.preparation import PreparedRequest
from jaxserve.engine.stop_strings import StopMatcher
from jaxserve.errors import InvalidRequestError, RequestError, RequestFailedError
from jaxserve.outputs import CompletionOutput, FinishReason, RequestOutput, TokenDelta, TokenLogprobs
from jaxserve.sampling_params import OutputKind, SamplingParams
from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer
from jaxserve.tokenizer.tokenizer import Tokenizer


class OutputProcessor:
    """One request's answer in the making. `push` what the engine sends, `take` what the user gets."""

    def __init__(self, prepared: PreparedRequest, tokenizer: Tokenizer) -> None:
        self._prepared = prepared
        self._kind: OutputKind = prepared.params.output_kind
        self._sequences = {
            request.request_id: SequenceOutput(index, request.sampling_params, request.eos_token_ids, tokenizer)
            for index, request in enumerate(prepared.sequences)
        }
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._has_new_prompt_logprobs = False
        self._num_cached_tokens = 0
        self._is_finished_taken = False
        self.error: RequestError | None = None  # set when one of the sequences failed

    @property
    def is_finished(self) -> bool:
        """True when every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences.values())

    @property
    def unfinished_ids(self) -> list[str]:
        """The sequences that the engine may still be working on."""
        return [name for name, sequence in self._sequences.items() if sequence.finish_reason is None]

    @property
    def finish_reasons(self) -> list[FinishReason]:
        """Of the sequences that have ended."""
        return [s.finish_reason for s in self._sequences.values() if s.finish_reason is not None]

    @property
    def num_output_tokens(self) -> list[int]:
        """Tokens generated so far, one entry a sequence."""
        return [sequence.num_tokens for sequence in self._sequences.values()]

    def push(self, delta: TokenDelta) -> bool:
        """Take in a delta. True: a stop string ended the sequence, and the engine has to be told to abort it."""
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
            self._has_new_prompt_logprobs = True
        if delta.num_cached_tokens is not None:
            self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason is FinishReason.ERROR:
            self.error = self._error_of(delta)
        return self._sequences[delta.request_id].push(delta)

    def _error_of(self, delta: TokenDelta) -> RequestError:
        message = delta.error or "the engine failed on this request"
        if delta.is_error_by_request:
            return InvalidRequestError(message, param=self._prepared.params.ruling_field, code="unsatisfiable_request")
        return RequestFailedError(message)

    def abort(self) -> None:
        """End the sequences that still run, with what they have."""
        for name in self.unfinished_ids:
            self._sequences[name].finish(FinishReason.ABORT)

    def take(self) -> RequestOutput | None:
        """What is new since the last call, or None."""
        is_finished = self.is_finished
        if self._is_finished_taken or (self._kind == "final_only" and not is_finished):
            return None
        sequences = self._sequences.values()
        news = [sequence for sequence in sequences if sequence.has_news]
        if not news and not self._has_new_prompt_logprobs:
            return None
        outputs = [sequence.take(self._kind) for sequence in (news if self._kind == "delta" else sequences)]
        prompt_logprobs = self._prompt_logprobs
        if self._kind == "delta" and not self._has_new_prompt_logprobs:
            prompt_logprobs = None
        self._has_new_prompt_logprobs = False
        self._is_finished_taken = is_finished
        return RequestOutput(
            request_id=self._prepared.request_id,
            prompt=self._prepared.prompt,
            prompt_token_ids=self._prepared.prompt_token_ids,
            outputs=outputs,
            finished=is_finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )


class SequenceOutput:
    """One sequence's tokens, text and end.

    # text   | sent ........ | unsent ......... | held back: may be the start of a stop string |
    """

    def __init__(self, index: int, params: SamplingParams, eos_token_ids: list[int], tokenizer: Tokenizer) -> None:
        self.finish_reason: FinishReason | None = None
        self.has_news = False
        self._index = index
        self._params = params
        self._eos_token_ids = frozenset(eos_token_ids).difference(params.stop_token_ids or ())
        self._detokenizer: IncrementalDetokenizer | None = None
        if params.detokenize:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                continues_text=True,
            )
        self._stop_matcher = StopMatcher(params.stop_strings) if params.stop else None
        self._stop_reason: int | str | None = None
        self._sent_text: list[str] = []
        self._unsent_text: list[str] = []
        self._num_sent_chars = 0
        self._num_chars = 0
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._text_offsets: list[int] = []  # kept where log-probabilities are asked
        self._num_sent_tokens = 0

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def push(self, delta: TokenDelta) -> bool:
        """Take in a delta. True: a stop string ended the sequence before the engine did."""
        if self.finish_reason is not None:
            return False  # was already under way when a stop string or an abort ended the sequence
        self.has_news = self.has_news or bool(delta.token_ids) or delta.finish_reason is not None
        ends_with_stop_token = delta.finish_reason is FinishReason.STOP
        for i, token_id in enumerate(delta.token_ids):
            logprobs = delta.logprobs[i] if delta.logprobs is not None else None
            is_stop_token = ends_with_stop_token and i == len(delta.token_ids) - 1
            if self._append(token_id, logprobs, is_stop_token):
                return delta.finish_reason is None
        if delta.finish_reason is not None:
            self.finish(delta.finish_reason)
            if delta.stop_token_id not in self._eos_token_ids and self._stop_reason is None:
                self._stop_reason = delta.stop_token_id
        return False

    def finish(self, reason: FinishReason) -> None:
        """End the sequence: text held back comes out, unless it completes a stop string."""
        self.has_news = True
        if self._detokenizer is not None and self._add_text(self._detokenizer.flush()):
            return
        self._stop_matcher = None
        self.finish_reason = reason

    def take(self, kind: OutputKind) -> CompletionOutput:
        """The sequence so far, or with "delta" what is new since the last call."""
        self.has_news = False
        new_text = self._release_text()
        first = self._num_sent_tokens if kind == "delta" else 0
        self._num_sent_tokens = len(self._token_ids)
        has_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text=new_text if kind == "delta" else "".join(self._sent_text),
            token_ids=self._token_ids[first:],
            logprobs=self._logprobs[first:] if has_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            seed=self._params.seed,
            text_offsets=self._text_offsets[first:] if has_logprobs and self._params.detokenize else None,
        )

    def _append(self, token_id: int, logprobs: TokenLogprobs | None, is_stop_token: bool) -> bool:
        """Add a token. True: its text completed a stop string, which ended the sequence."""
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
            self._text_offsets.append(self._num_chars)
        if self._detokenizer is None or (is_stop_token and not self._params.include_stop_str_in_output):
            return False
        return self._add_text(self._detokenizer.push((token_id,)))

    def _add_text(self, text: str) -> bool:
        """Add text. True: it completed a stop string; the text is cut there and the sequence has ended."""
        if not text:
            return False
        self._unsent_text.append(text)
        self._num_chars += len(text)
        if self._stop_matcher is None:
            return False
        match = self._stop_matcher.feed(text, can_match=len(self._token_ids) >= self._params.min_tokens)
        if match is None:
            return False
        self._cut_text(match.end if self._params.include_stop_str_in_output else match.start)
        self._stop_matcher = None
        self._stop_reason = match.stop
        self.finish_reason = FinishReason.STOP
        return True

    def _cut_text(self, num_chars: int) -> None:
        """Shorten the whole text; what is cut was never sent, because it was held back."""
        unsent = "".join(self._unsent_text)
        self._unsent_text = [unsent[: num_chars - self._num_sent_chars]]
        self._num_chars = num_chars
        self._text_offsets = [min(offset, num_chars) for offset in self._text_offsets]

    def _release_text(self) -> str:
        text = "".join(self._unsent_text)
        num_held_back = self._stop_matcher.num_held_back if self._stop_matcher is not None else 0
        released = text[: len(text) - num_held_back]
        self._unsent_text = [text[len(released) :]] if num_held_back else []
        if released:
            self._sent_text.append(released)
            self._num_sent_chars += len(released)
        return released
