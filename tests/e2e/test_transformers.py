"""What the server answers over HTTP against transformers in float32: the same tokens, the same log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from tests.checkpoints import smollm2_logprobs
from tests.e2e.server import NAME

NUM_TOKENS = 24
PROMPTS = [
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a lighthouse keeper who wrote a letter every evening, and one day the sea wrote back:",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_every_log_probability_are_those_of_transformers(client, http, prompt):
    prompt_ids = http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    choice = client.completions.create(
        model=NAME, prompt=prompt, temperature=0, max_tokens=NUM_TOKENS, logprobs=5, echo=True,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True},
    ).choices[0]  # fmt: skip
    answer = choice.token_ids
    assert len(answer) == NUM_TOKENS
    # One pass over the whole text: each position's best token is what greedy decoding takes there.
    wanted = smollm2_logprobs(prompt_ids + answer)
    positions = range(len(prompt_ids) - 1, len(prompt_ids) + NUM_TOKENS - 1)
    assert [int(wanted[at].argmax()) for at in positions] == answer

    following = (prompt_ids + answer)[1:]
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs[1:], wanted[range(len(following)), following], atol=1e-3, rtol=0
    )
    for at, alternatives in enumerate(choice.logprobs.top_logprobs[1:]):
        for name, logprob in alternatives.items():
            assert logprob == pytest.approx(wanted[at, int(name.removeprefix("token_id:"))], abs=1e-3)
