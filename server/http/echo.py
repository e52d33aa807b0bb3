"""A prompt as `echo` shows it: its text, and where in it each of its tokens begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer

MOST_PENDING = 16
"""Tokens in a row that complete no character; behind them it is not waited for any longer (count)."""


@dataclass(frozen=True)
class Echo:
    """Of one prompt."""

    text: str
    token_ids: Sequence[int]
    starts: list[int]
    """Of each token (characters)."""


def echo_of(text: str | None, token_ids: Sequence[int], tokenizer: "Tokenizer") -> Echo:
    """`text` is what the token ids were made of; None: they were sent themselves, and their text leaves control tokens
    out."""
    stream, pending = tokenizer.stream(), 0
    made, starts, at = list[str](), list[int](), 0
    for token_id in token_ids:
        starts.append(at if text is None else min(at, len(text)))
        name = tokenizer.token(token_id)
        if tokenizer.control_id(name) is not None:
            piece = name if text is not None and text.startswith(name, at) else ""  # else it is a BOS that was added
        else:
            piece, pending = stream.feed(token_id), pending + 1
            if pending > MOST_PENDING and not piece:
                piece = stream.finish()
            if piece:
                pending = 0
                if piece.endswith("\ufffd"):
                    stream = tokenizer.stream()
        made.append(piece)
        at += len(piece)
    return Echo("".join(made) + stream.finish() if text is None else text, token_ids, starts)
