"""A byte-level BPE tokenizer from vocab.json and merges.txt, as folders had it before tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import RefusedError
from ..text.tokenizer import byte_level_bpe

VOCABULARY, MERGES = "vocab.json", "merges.txt"

SPLITS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
"""How text is split before merging, by the `tokenizer_class` of tokenizer_config.json: these files do not tell."""


def read_merges(folder: Path, tokenizer_class: Any, special: Mapping[str, str]) -> Backend:
    """The folder's vocabulary and merges.

    Args:
        tokenizer_class: of tokenizer_config.json; transformers puts `Fast` behind some.
        special: the control tokens, of which those are taken that the vocabulary has.

    Raises RefusedError for a class that is not in SPLITS, and for files that are damaged.
    """
    name = str(tokenizer_class).removesuffix("Fast")
    if name not in SPLITS:
        raise RefusedError(
            f"{str(folder)!r} has {VOCABULARY} and {MERGES} of a tokenizer_class {tokenizer_class!r}; those there are: "
            f"{', '.join(SPLITS)}; save it with transformers, which writes a tokenizer.json"
        )
    ids = _ids(folder / VOCABULARY)
    lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    control = sorted({ids[token] for token in special.values() if token in ids})
    try:
        return byte_level_bpe(sorted(ids, key=ids.__getitem__), merges, split=SPLITS[name], control_ids=control)
    except Exception as error:  # the library raises no narrower one
        raise RefusedError(f"{str(folder / MERGES)!r} does not fit {VOCABULARY} ({error}); fetch both anew") from error


def _ids(path: Path) -> dict[str, int]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RefusedError(f"{str(path)!r} is not JSON ({error}); fetch it anew") from error
    if not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
        raise RefusedError(f"{str(path)!r} does not number its tokens from 0 on; fetch it anew")
    return ids
