"""What the server answers over HTTP against transformers in float32: the same tokens, the same log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.source import resolve_source
from tests.e2e.server import MODEL, NAME

NUM_TOKENS = 24
PROMPTS = [
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a lighthouse keeper who wrote a letter every evening, and one day the sea wrote back:",
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' model with the tensors of our checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(resolve_source(MODEL), dtype=np.float32)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config())).to(torch.float32).eval()
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.tensor_names()}
    missing, surplus = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not surplus
    model.tie_weights()
    return model


def logprobs_of(model: Any, token_ids: list[int]) -> np.ndarray:
    """f64[tokens, vocab]: the log-probabilities after each token."""
    import torch

    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), -1).numpy()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_every_log_probability_are_those_of_transformers(client, http, reference, prompt):
    prompt_ids = http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    choice = client.completions.create(
        model=NAME, prompt=prompt, temperature=0, max_tokens=NUM_TOKENS, logprobs=5, echo=True,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": True},
    ).choices[0]  # fmt: skip
    answer = choice.token_ids
    assert len(answer) == NUM_TOKENS
    # One pass over the whole text: each position's best token is what greedy decoding takes there.
    wanted = logprobs_of(reference, prompt_ids + answer)
    positions = range(len(prompt_ids) - 1, len(prompt_ids) + NUM_TOKENS - 1)
    assert [int(wanted[at].argmax()) for at in positions] == answer

    following = (prompt_ids + answer)[1:]
    np.testing.assert_allclose(
        choice.logprobs.token_logprobs[1:], wanted[range(len(following)), following], atol=1e-3, rtol=0
    )
    for at, alternatives in enumerate(choice.logprobs.top_logprobs[1:]):
        for name, logprob in alternatives.items():
            assert logprob == pytest.approx(wanted[at, int(name.removeprefix("token_id:"))], abs=1e-3)
