"""Log-probabilities in the forms that chats, completions and vLLM's `prompt_logprobs` have."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from api.token_names import TokenName, TokenNames
from jaxserve.outputs import TokenLogprobs

MIN_LOGPROB = -9999.0  # stands for -inf, which JSON cannot write


def finite(logprob: float) -> float:
    """Return a number that JSON can write; NaN is below everything as well."""
    return logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


@dataclass(frozen=True, slots=True)
class LogprobForms:
    """Writes log-probabilities for one request; `as_token_ids` names tokens "token_id:<id>" instead of by text."""

    names: TokenNames
    as_token_ids: bool = False

    def chat(self, positions: Iterable[TokenLogprobs], num_top: int) -> dict[str, Any]:
        """Return chat's form: an entry a token, each with its `num_top` most likely alternatives."""
        return {
            "content": [
                self._entry(at.token_id, at.logprob)
                | {
                    "top_logprobs": [
                        self._entry(token_id, logprob)
                        for token_id, logprob in zip(at.top_token_ids[:num_top], at.top_logprobs, strict=False)
                    ]
                }
                for at in positions
            ],
            "refusal": None,
        }

    def completion(
        self, positions: Sequence[TokenLogprobs | None], token_ids: Sequence[int], offsets: Sequence[int], num_top: int
    ) -> dict[str, list[Any]]:
        """Return completions' form: four lists of one entry a token. None is a token with nothing before it."""
        keys = [self._key(token_id) for token_id in token_ids]
        return {
            "text_offset": list(offsets),
            "token_logprobs": [None if at is None else finite(at.logprob) for at in positions],
            "tokens": keys,
            "top_logprobs": [None if at is None else self._alternatives(at, num_top) for at in positions],
        }

    def prompt(self, positions: Iterable[TokenLogprobs | None], num_top: int) -> list[dict[str, Any] | None]:
        """Return vLLM's form: by token id, the prompt's own token first."""
        return [None if at is None else self._ranked(at, num_top) for at in positions]

    def prompt_offsets(self, token_ids: Iterable[int], text: str) -> list[int]:
        """Return where each prompt token begins in the echoed `text`, in characters.

        Tokens that the text does not show, such as a BOS token the tokenizer added, have no width.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        special_ids = self.names.tokenizer.special_ids
        offsets, position = [], 0
        for token_id in token_ids:
            offsets.append(position)
            piece = decoder.decode(bytes(self.names[token_id].token_bytes))
            if text.startswith(piece, position):
                position += len(piece)
            elif token_id not in special_ids:
                position += len(piece.lstrip(" ") if position == 0 else piece)
        return offsets

    def _alternatives(self, at: TokenLogprobs, num_top: int) -> dict[str, float]:
        # OpenAI adds the chosen token when it is not among the most likely.
        top = zip(at.top_token_ids[:num_top], at.top_logprobs, strict=False)
        alternatives = {self._key(token_id): finite(logprob) for token_id, logprob in top}
        alternatives.setdefault(self._key(at.token_id), finite(at.logprob))
        return alternatives

    def _ranked(self, at: TokenLogprobs, num_top: int) -> dict[str, Any]:
        entries = {at.token_id: (at.logprob, at.rank)}
        top = zip(at.top_token_ids[:num_top], at.top_logprobs, strict=False)
        for rank, (token_id, logprob) in enumerate(top, start=1):
            entries.setdefault(token_id, (logprob, rank))
        return {
            str(token_id): {"logprob": finite(logprob), "rank": rank, "decoded_token": self.names[token_id].text}
            for token_id, (logprob, rank) in entries.items()
        }

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        name: TokenName = self.names[token_id]
        text = f"token_id:{token_id}" if self.as_token_ids else name.text
        return {"token": text, "logprob": finite(logprob), "bytes": name.token_bytes}

    def _key(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_token_ids else self.names[token_id].key
