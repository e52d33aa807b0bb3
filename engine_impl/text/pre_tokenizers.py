"""How byte-level vocabularies split text before they merge, by llama.cpp's names (`tokenizer.ggml.pre` of GGUF files).

A wrong split gives wrong ids in silence, so a name that is not here is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Regex, normalizers
from tokenizers import pre_tokenizers as steps

from ..errors import RefusedError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
"""Published with Llama 3's tokenizer (meta-llama/llama3, tokenizer.py); that of cl100k_base, which Phi-4 takes too."""

QWEN2 = _WORDS + r"|\p{N}" + _REST
"""Published with Qwen2's tokenizer.json."""

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
"""Published with Mistral Nemo's tokenizer.json."""

O200K = "|".join(word + _SUFFIX for word in _CASED) + r"|\p{N}{1,3}" + _CASED_REST
"""o200k_base, published in tiktoken; Phi-4-mini's."""


@dataclass(frozen=True)
class PreTokenizer:
    """What happens to text before merging."""

    steps: Sequence[steps.PreTokenizer]
    ignore_merges: bool = False
    """A word that is a token as a whole is taken as that, whatever its merges would make."""
    adds_bos: bool = False
    """A BOS comes first where a file does not say."""
    normalizer: normalizers.Normalizer | None = None


def _by(pattern: str) -> list[steps.PreTokenizer]:
    return [steps.Split(Regex(pattern), "isolated"), steps.ByteLevel(add_prefix_space=False, use_regex=False)]


_GPT2 = steps.ByteLevel(add_prefix_space=False)
_DIGITS = PreTokenizer([steps.Digits(individual_digits=True), _GPT2])
_LLAMA3 = PreTokenizer(_by(LLAMA3), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer(_by(QWEN2), normalizer=normalizers.NFC())

PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([_GPT2]),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": PreTokenizer(_DIGITS.steps, normalizer=normalizers.NFC()),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": PreTokenizer(_by(LLAMA3)),
    "smaug-bpe": PreTokenizer(_by(LLAMA3)),
    "glm4": PreTokenizer(_by(LLAMA3)),
    "chatglm-bpe": PreTokenizer(_by(LLAMA3)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": PreTokenizer(_by(QWEN2)),
    "tekken": PreTokenizer(_by(TEKKEN), ignore_merges=True, adds_bos=True),
    "gpt-4o": PreTokenizer(_by(O200K)),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Raises RefusedError for a name that is not known."""
    if name not in PRE_TOKENIZERS:
        raise RefusedError(f"pre-tokenizer {name!r} is not there; those there are: {', '.join(PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]
