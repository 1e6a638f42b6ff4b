"""How text is cut into words before byte-level BPE, by the name in a GGUF file's `tokenizer.ggml.pre`.

A GGUF file names its pre-tokenizer instead of carrying it. Each is a list of regular expressions, as the model's own
tokenizer.json has them: the first cuts the text, the next cuts each piece, and so on; what no expression matches is a
piece too.
"""

from __future__ import annotations

from dataclasses import dataclass

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SUFFIX = rf"(?i:{_CONTRACTIONS})"
_SPACES = r"\s+(?!\S)|\s+"

_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_DIGIT = r"\p{N}"


def _llama3_like(number: str, lead: str = rf"{_SUFFIX}|", letters: str = r"\p{L}+", marks: str = "") -> str:
    """Return the family that cl100k began: words with at most one leading sign, then numbers, signs, line ends."""
    signs = rf" ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*"
    return rf"{lead}[^\r\n\p{{L}}\p{{N}}]?{letters}|{number}|{signs}|\s*[\r\n]+|{_SPACES}"


def _cased(suffix: str, number: str) -> str:
    """Return the family that o200k began: a word also ends where lower case meets upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
    return rf"{words}|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"


_LLAMA3 = (_llama3_like(r"\p{N}{1,3}"),)
_QWEN2 = (_llama3_like(_DIGIT),)
_TEKKEN = (_cased("", _DIGIT),)
_GPT4O = (_cased(rf"{_SUFFIX}?", r"\p{N}{1,3}"),)
_DIGITS_THEN_GPT2 = (_DIGIT, _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}",
)
_BLOOM = (r" ?[^(\s|.,!?…。，、।۔،)]+",)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    rf"|\s*[\r\n]|{_SPACES}",
)
_SEED_CODER = (rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}",)
_QWEN35 = (_llama3_like(_DIGIT, letters=r"[\p{L}\p{M}]+", marks=r"\p{M}"),)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a `tokenizer.ggml.pre` stands for."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as a whole is taken as it is
    add_bos: bool = False  # where the file does not say


def _table() -> dict[str, PreTokenizer]:
    groups: list[tuple[str, PreTokenizer]] = [
        ("default", PreTokenizer(_DEFAULT)),
        (
            "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2",
            PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True),
        ),
        ("dbrx smaug-bpe chatglm-bpe", PreTokenizer(_LLAMA3)),
        ("glm4", PreTokenizer(_LLAMA3, ignore_merges=True)),
        ("qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan grok-2 kormo", PreTokenizer(_QWEN2)),
        ("qwen35", PreTokenizer(_QWEN35)),
        ("tekken", PreTokenizer(_TEKKEN, ignore_merges=True, add_bos=True)),
        ("gpt-4o llama4 kanana2 minimax-m2", PreTokenizer(_GPT4O)),
        ("gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4", PreTokenizer((_GPT2,))),
        ("smollm starcoder refact command-r codeshell exaone minerva-7b", PreTokenizer(_DIGITS_THEN_GPT2)),
        ("falcon", PreTokenizer(_FALCON)),
        ("deepseek-coder", PreTokenizer(_DEEPSEEK_CODER)),
        ("deepseek-v3 hunyuan-dense", PreTokenizer(_DEEPSEEK_V3)),
        ("bloom gpt3-finnish poro-chat", PreTokenizer(_BLOOM)),
        ("viking", PreTokenizer((*_BLOOM, _DIGIT))),
        ("bailingmoe bailingmoe2 llada-moe", PreTokenizer(_BAILING)),
        ("seed-coder", PreTokenizer(_SEED_CODER)),
    ]
    return {name: kind for names, kind in groups for name in names.split()}


PRE_TOKENIZERS = _table()
