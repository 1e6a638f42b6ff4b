"""Reading tokenizers from folders and GGUF files, and what `Tokenizer` answers."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from jaxserve.errors import CheckpointError, InvalidRequestError, TokenizerError
from jaxserve.tokenizer.tokenizer import Tokenizer, tokenizer_from_backend


@pytest.fixture
def folder(tmp_path, byte_level):
    byte_level.backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"})
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def test_a_folder_gives_the_same_tokens_as_the_file_it_was_made_of(folder, byte_level):
    text = "Hello 123, 你好 😀<|im_end|>"

    tokenizer = Tokenizer.from_source(folder)

    assert tokenizer.encode(text) == byte_level.encode(text)
    assert tokenizer.vocab_size == byte_level.vocab_size
    assert tokenizer.bos_token_id == tokenizer.backend.token_to_id("<|im_start|>")


def test_eos_ids_are_those_of_tokenizer_config_and_generation_config(folder):
    write(folder, "config.json", {"eos_token_id": 5})
    write(folder, "generation_config.json", {"eos_token_id": [7, 5]})

    tokenizer = Tokenizer.from_source(folder)

    assert tokenizer.eos_token_ids == (5, 7, tokenizer.backend.token_to_id("<|im_end|>"))


@pytest.mark.parametrize(("value", "shown"), [("x", "'x'"), ([1, "2"], r"\[1, '2'\]"), (True, "True"), (-1, "-1")])
def test_an_eos_id_that_is_no_token_id_is_named(folder, value, shown):
    write(folder, "generation_config.json", {"eos_token_id": value})

    wanted = rf"^generation_config\.json: 'eos_token_id' must be an integer from 0 to 2147483647, .*, got {shown}$"
    with pytest.raises(CheckpointError, match=wanted):
        Tokenizer.from_source(folder)


def test_smollm2_knows_its_special_tokens(smollm2):
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.pad_token_id == 2
    assert smollm2.vocab_size == 49152
    assert smollm2.special_ids == frozenset(range(17))
    assert smollm2.special_tokens["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in smollm2.chat_template


def test_special_tokens_are_skipped_unless_wanted(smollm2):
    ids = smollm2.encode("<|im_start|>user<|im_end|>")

    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user<|im_end|>"


@pytest.mark.parametrize("text", ["Hello world", "naïve 你好 😀👍🏽", "\n\t  x", "Ġ▁<0x41>"])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(text, smollm2, byte_level):
    for tokenizer in (smollm2, byte_level):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()


def test_sentence_piece_bytes_are_those_of_the_text_behind_the_added_space(sentence_piece):
    text = "Hello 你好 😀 \x07"

    ids = sentence_piece.encode(text, add_special_tokens=False)

    assert b"".join(sentence_piece.token_bytes(token_id) for token_id in ids) == b" " + text.encode()
    assert sentence_piece.token_bytes(sentence_piece.backend.token_to_id("<0xAB>")) == b"\xab"
    assert sentence_piece.token_text(sentence_piece.backend.token_to_id("<0xAB>")) == "\ufffd"


def test_added_tokens_stand_for_their_own_text(smollm2):
    assert smollm2.token_bytes(2) == b"<|im_end|>"


def test_an_id_beyond_the_vocabulary_is_empty_text(smollm2):
    assert smollm2.token_bytes(10**6) == b""
    assert smollm2.token(10**6) is None
    assert smollm2.convert_ids_to_tokens([2, 10**6]) == ["<|im_end|>", None]
    assert smollm2.decode([10**6]) == ""


def test_a_tokenizer_with_another_decoder_still_names_bytes():
    backend = Backend(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()

    tokenizer = tokenizer_from_backend(backend)

    assert tokenizer.token_bytes(1) == b"play"


def test_lone_surrogates_are_the_requests_fault(smollm2):
    with pytest.raises(InvalidRequestError, match="surrogates"):
        smollm2.encode("a\ud800b")


def test_long_text_is_tokenised_as_short_text_is_and_lets_other_threads_run(smollm2):
    line = "A line of text, with <|im_end|> and 12 numbers.\n"
    assert smollm2.encode(line * 300) == smollm2.encode(line) * 300
    with pytest.raises(InvalidRequestError, match="surrogates"):
        smollm2.encode("\ud800" * 5000)

    with ThreadPoolExecutor(1) as pool:
        tokenising = pool.submit(smollm2.encode, "x" * 1_000_000)
        num_turns = 0
        while not tokenising.done():
            time.sleep(0.001)
            num_turns += 1
    assert num_turns > 20


def test_many_threads_get_the_same_tokens(smollm2):
    texts = [f"Number {i}: 你好 😀 {'x' * i}" for i in range(200)]
    alone = [smollm2.encode(text) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(smollm2.encode, texts))
        decoded = list(pool.map(smollm2.decode, together))

    assert together == alone
    assert decoded == texts


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        Tokenizer.from_source(tmp_path)


def test_a_damaged_tokenizer_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_source(tmp_path)


def test_a_damaged_tokenizer_config_is_refused(folder):
    (folder / "tokenizer_config.json").write_text("[1]")

    with pytest.raises(TokenizerError, match="not a JSON object"):
        Tokenizer.from_source(folder)


def test_a_template_file_goes_before_the_one_in_the_config(folder):
    write(folder, "tokenizer_config.json", {"chat_template": "old"})
    assert Tokenizer.from_source(folder).chat_template == "old"

    (folder / "chat_template.jinja").write_text("new")
    assert Tokenizer.from_source(folder).chat_template == "new"

    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.from_source(folder).chat_template == {"default": "new", "tool_use": "tools"}


def test_a_list_of_named_templates_becomes_a_dict(folder):
    write(folder, "tokenizer_config.json", {"chat_template": [{"name": "default", "template": "x"}]})

    assert Tokenizer.from_source(folder).chat_template == {"default": "x"}


@pytest.mark.parametrize("template", [5, [{"name": "default"}], ["x"], [{"name": "default", "template": 5}]])
def test_a_chat_template_of_another_type_is_named(folder, template):
    write(folder, "tokenizer_config.json", {"chat_template": template})

    with pytest.raises(TokenizerError, match="has a chat_template that is neither a string nor a list of named ones"):
        Tokenizer.from_source(folder)


def test_truncation_and_padding_of_the_file_are_off(folder, byte_level):
    copy = Backend.from_str(byte_level.backend.to_str())
    copy.enable_truncation(2)
    copy.enable_padding(length=64)
    copy.save(str(folder / "tokenizer.json"))

    assert Tokenizer.from_source(folder).encode("a long text here") == byte_level.encode("a long text here")


def test_older_files_are_converted_with_a_warning(tmp_path, byte_level, caplog):
    backend = json.loads(byte_level.backend.to_str())["model"]
    write(tmp_path, "vocab.json", backend["vocab"])
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in backend["merges"]))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})

    tokenizer = Tokenizer.from_source(tmp_path)

    assert "converting" in caplog.text
    assert tokenizer.decode(tokenizer.encode("hello world", add_special_tokens=False)) == "hello world"


def test_a_sentencepiece_model_alone_gives_its_own_tokens(tmp_path):
    lines = ["the quick brown fox jumps over the lazy dog", "hello world", "numbers 1 2 3 10 20"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 50),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "hello  quick 20 foxes 😀"

    tokenizer = Tokenizer.from_source(tmp_path)

    assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert tokenizer.decode(original.encode(text)) == text
    assert tokenizer.eos_token_ids == (2,)


def test_importing_and_loading_a_folder_needs_none_of_the_heavy_libraries(folder):
    script = (
        "import sys\n"
        "from jaxserve.tokenizer.tokenizer import Tokenizer\n"
        "from jaxserve.tokenizer.detokenizer import IncrementalDetokenizer\n"
        f"Tokenizer.from_source({str(folder)!r})\n"
        "print([m for m in ('jax', 'transformers', 'torch', 'gguf', 'huggingface_hub') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
