"""The model's tokenizer as JetStream's."""

from typing import Any

import jax
import numpy as np

from ..errors import RefusedError
from ..text.tokenizer import Tokenizer
from . import compat as jetstream_compat

with jetstream_compat.importing():
    from jetstream.engine import token_utils, tokenizer_api

NO_BOS = -1
"""The BOS of a model that takes none, as in SentencePiece. JetStream puts a BOS before every prompt, token lists too;
this one is no token, so that it can be told from the prompt and taken away."""

NO_TOKEN = -2
"""An id that no vocabulary has."""


class JetStreamTokenizer(tokenizer_api.Tokenizer):
    """The model's tokenizer, as JetStream's Driver uses one: prompts padded, answers decoded a token at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            # Some decoders drop the space that a text begins with, so every token is decoded behind this one.
            self._before_ids = tokenizer.encode("a")[-1:]
        except RefusedError:  # a model without a tokenizer: token ids only
            self._before_ids = []
        self._before = tokenizer.decode(self._before_ids)

    def encode(self, s: str, **kwargs: Any) -> tuple[jax.Array | np.ndarray, int]:
        """(token ids behind `bos_id`, padded to the next of JetStream's lengths; their number without the padding).

        Takes JetStream's options: is_bos, prefill_lengths, max_prefill_length, jax_padding. For a model without a
        tokenizer the ids are none that could be answered, see `Adapter.prefix_of`.
        """
        token_ids = self._tokenizer.encode(s) if self._before_ids else [NO_TOKEN]
        if self.bos_id != NO_BOS:
            token_ids = token_ids[1:]  # JetStream puts it back
        return token_utils.pad_tokens(np.array(token_ids, np.int32), self.bos_id, self.pad_id, **kwargs)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of an answer's tokens. A single token that is part of a character is its bytes, `<0xF0><0x9F>`,
        which the orchestrator joins with what follows."""
        text = self._tokenizer.decode([*self._before_ids, *token_ids]).removeprefix(self._before)
        if len(token_ids) == 1 and "\ufffd" in text:
            return "".join(f"<0x{byte:02X}>" for byte in self._tokenizer.token_bytes(token_ids[0]))
        return text

    @property
    def stop_tokens(self) -> set[int]:
        """Tokens that end an answer."""
        return set(self._tokenizer.stop_ids)

    @property
    def bos_id(self) -> int:
        """What JetStream puts before every prompt: the model's BOS, or NO_BOS where its tokenizer adds none."""
        return next(iter(self._tokenizer.first_ids), NO_BOS)

    @property
    def eos_id(self) -> int:
        """One of the tokens that end an answer; NO_TOKEN where none does."""
        eos_id = self._tokenizer.eos_id
        return NO_TOKEN if eos_id is None else eos_id

    @property
    def pad_id(self) -> int:
        """What JetStream fills a prompt's padded length with; no attention sees it."""
        return 0
