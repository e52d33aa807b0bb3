"""tekken.json: Mistral's byte-level BPE tokenizer, a list of tokens by rank. https://github.com/mistralai/mistral-common"""

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError

TEKKEN = "tekken.json"
BOS, EOS = "<s>", "</s>"

SPECIAL = (
    "<unk>", BOS, EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The first control tokens of files that do not list them."""

PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
LETTERS = {byte: chr(byte) for byte in PLAIN} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
"""How byte-level BPE writes a byte, as GPT-2 does."""


def read_tekken(path: Path) -> Backend:
    """The file's tokenizer: control tokens first, then the vocabulary in the order of its ranks."""
    told = json.loads(path.read_text(encoding="utf-8"))
    config, special = told["config"], _special(told)
    count = config["default_vocab_size"] - len(special)
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in told["vocab"][:count]]
    rank = {token: i for i, token in enumerate(tokens)}
    texts = [*special, *map(_letters, tokens)]
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts) or any(entry.get("rank", i) != i for i, entry in enumerate(told["vocab"][:count])):
        raise RefusedError(f"{str(path)!r} has tokens twice, or not in the order of their ranks; fetch it anew")
    merges = [pair for token in tokens for pair in _merges(token, rank)]
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _special(told: dict[str, Any]) -> list[str]:
    """So many as the file says, by rank."""
    listed = told.get("special_tokens")
    names = SPECIAL if listed is None else [entry["token_str"] for entry in sorted(listed, key=lambda one: one["rank"])]
    count = told["config"]["default_num_special_tokens"]
    return [*names, *(f"<SPECIAL_{i}>" for i in range(len(names), count))][:count]


def _letters(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _merges(token: bytes, rank: dict[bytes, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make this one, those of the lowest ranks first: whichever pair stands there when it is
    merged, the rank is the whole token's."""
    pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
    pairs = sorted((rank[left], rank[right], left, right) for left, right in pairs if left in rank and right in rank)
    return [(_letters(left), _letters(right)) for _, _, left, right in pairs]
