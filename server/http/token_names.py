"""Tokens as texts, for log-probabilities."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ...engine_impl.errors import RefusedError

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer

REMEMBERED = 1 << 16
"""Tokens whose names are kept (count)."""


@dataclass(frozen=True, slots=True)
class TokenName:
    """What one token stands for."""

    text: str
    """For reading: part of a character is U+FFFD, a control token its name."""
    bytes: list[int]


class TokenNames:
    """Of one tokenizer. Each is made once: an answer with 20 alternatives a token asks for 21 names a token."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self.tokenizer = tokenizer
        try:
            # Some decoders drop the space that a text begins with, so every token is decoded behind this one.
            self._before_ids = tokenizer.encode("a")[-1:]
        except RefusedError:  # a model without a tokenizer
            self._before_ids = []
        self._before = tokenizer.decode(self._before_ids)
        self.of = lru_cache(REMEMBERED)(self._named)
        """token id -> TokenName"""

    def _named(self, token_id: int) -> TokenName:
        text = self.tokenizer.decode([*self._before_ids, token_id]).removeprefix(self._before)
        if text and "\ufffd" not in text:
            return TokenName(text, list(text.encode()))
        raw = self.tokenizer.token_bytes(token_id)
        return TokenName(raw.decode(errors="replace"), list(raw))
