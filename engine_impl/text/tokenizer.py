"""Text to token ids and back, over Hugging Face `tokenizers`."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError, TooLongError
from .chat import END, Chat, ChatPrompt, TemplateFacts
from .chat_template import ChatTemplate
from .grammar import Grammars, Matcher
from .pre_tokenizers import pre_tokenizer

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_OF_CHARACTER = {chr(byte): bytes([byte]) for byte in _PRINTABLE} | {
    chr(0x100 + index): bytes([byte]) for index, byte in enumerate(sorted(set(range(0x100)) - set(_PRINTABLE)))
}
"""How byte-level vocabularies write bytes: as the Latin-1 character where that is printable, else from U+0100 on."""

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would be for batches, which there are none of

FIRST_PIECE = 1 << 14
"""How much of a text is read first, to see whether it can be short enough (characters); then four times that, ..."""
SLACK = 1024
"""How many of a piece's tokens may change with what follows it (tokens). Merges look a few tokens ahead."""
MAX_KEPT = 4096
"""Texts of a few tokens that are kept (count)."""
LOCAL = ("BPE", "Unigram")
"""Models of `tokenizers` of which that is true. A word of WordPiece is unknown as a whole."""


class Tokenizer:
    """A model's tokenizer: ids, stop ids and chat form."""

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: frozenset[int],
        first_ids: Sequence[int] = (),
        text_prefix: str = "",
        chat_template: ChatTemplate | None,
    ) -> None:
        """
        Args:
            first_ids: what comes before every raw text, mostly a BOS.
            text_prefix: what is put before a text that does not begin with a control token: SentencePiece's space.
        """
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.stop_ids = stop_ids
        self.first_ids = tuple(first_ids)
        self._backend = backend
        self.decode_again = lru_cache(MAX_KEPT)(self.decode)
        """As `decode`, for a tuple of a few ids that other answers are likely to have too."""
        self._text_prefix = text_prefix
        added = backend.get_added_tokens_decoder().items()
        self._control_ids = {token.content: token_id for token_id, token in added if token.special}
        self._chat_template = chat_template
        self._is_local = type(backend.model).__name__ in LOCAL
        self._grammars = Grammars(backend, stop_ids, vocab_size)

    def encode(self, text: str, at_most: int | None = None, *, with_first: bool = True) -> list[int]:
        """Token ids of raw text; a BOS comes first only if the model's tokenizer says so, and never twice. Control
        tokens written out in the text (`<|im_end|>`) become their ids. Without `with_first` there are no others.

        Raises TooLongError for a text that has clearly more tokens than `at_most`, without reading all of it.
        """
        token_ids, first_ids = self._encode(text, at_most), list(self.first_ids)
        is_there = first_ids == token_ids[: len(first_ids)]
        return token_ids if is_there or not with_first else first_ids + token_ids

    def encode_chat(self, chat: Chat, at_most: int | None = None) -> ChatPrompt:
        """A conversation in the model's chat form, which brings its own BOS, or has none.

        Raises RefusedError as `render_chat` does, and TooLongError as `encode` does.
        """
        text = self.render_chat(chat)
        return ChatPrompt(self._encode(text, at_most), text[-END:])

    def decode(self, token_ids: Sequence[int], *, with_control: bool = False) -> str:
        """Text of token ids; control tokens are left out unless asked for, bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=not with_control)

    def token(self, token_id: int) -> str:
        """How the vocabulary writes a token; empty for an id that it does not have."""
        return self._backend.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """What one token of a byte-level or byte-fallback vocabulary stands for: perhaps part of a character."""
        token = self.token(token_id)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        return b"".join(BYTES_OF_CHARACTER.get(character, character.encode()) for character in token)

    def render_chat(self, chat: Chat) -> str:
        """A conversation as the text that the model was trained on, ready for its answer.

        Raises RefusedError when the model has no chat template or its template refuses the messages.
        """
        if self._chat_template is None:
            raise RefusedError("this model has no chat template; send raw text instead")
        return self._chat_template.render(chat)

    @property
    def template_facts(self) -> TemplateFacts:
        """Of the chat template; those of none without one."""
        return TemplateFacts() if self._chat_template is None else self._chat_template.facts

    def control_id(self, text: str) -> int | None:
        """The control token that is written so; None: there is none."""
        return self._control_ids.get(text)

    @property
    def chat_template(self) -> str | None:
        """Its jinja text; None without one."""
        return None if self._chat_template is None else self._chat_template.source

    def matcher(self, grammar: str) -> Matcher:
        """At the beginning of an answer in a grammar, see server/request/grammar.py.

        Raises RefusedError for one that cannot be compiled, or takes too much.
        """
        return self._grammars.matcher(grammar)

    def prepare_grammars(self) -> None:
        """Make what all grammars need, which else the first one does while others wait. Nothing comes of a tokenizer
        that takes no grammars: the first one is refused."""
        with suppress(RefusedError):
            self._grammars.prepare()

    def check_template(self) -> None:
        """Raises RefusedError for a chat template that comes to no end with a short conversation."""
        if self._chat_template is not None:
            self._chat_template.check()

    def stream(self, shown: Collection[str] = ()) -> "TextStream":
        """A decoder for one answer. `shown`: control tokens that it writes out."""
        return TextStream(self, {self._control_ids[text]: text for text in shown if text in self._control_ids})

    def _encode(self, text: str, at_most: int | None) -> list[int]:
        if self._text_prefix and text and not text.startswith(tuple(self._control_ids)):
            text = self._text_prefix + text
        if at_most is not None and self._is_local:
            self._check_length(text, at_most)
        return self._ids(text)

    def _check_length(self, text: str, at_most: int) -> None:
        """Raises TooLongError when a piece from the beginning has more tokens already."""
        length = FIRST_PIECE
        while length < len(text):
            if len(self._ids(text[:length])) > at_most + SLACK:
                raise TooLongError(f"the text has more than {at_most} tokens")
            length *= 4

    def _ids(self, text: str) -> list[int]:
        """Of the library's calls this one alone lets other threads run, and is the quickest."""
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids


class NoTokenizer(Tokenizer):
    """For a model that comes without one: token ids work, texts are refused, answers have no text."""

    def __init__(self, where: str, *, vocab_size: int, bos_id: int | None, stop_ids: frozenset[int]) -> None:
        """`where` is what messages call the model."""
        eos_id = min(stop_ids, default=None)
        backend = Backend(models.BPE())
        super().__init__(
            backend, vocab_size=vocab_size, bos_id=bos_id, eos_id=eos_id, stop_ids=stop_ids, chat_template=None
        )
        self._where = where

    def render_chat(self, chat: Chat) -> str:
        """Raises RefusedError."""
        raise self._refusal()

    def matcher(self, grammar: str) -> Matcher:
        """Raises RefusedError."""
        raise RefusedError(f"{self._where} has no tokenizer, and a grammar is about text; leave it out")

    def prepare_grammars(self) -> None:
        """Nothing to make."""

    def _encode(self, text: str, at_most: int | None) -> list[int]:
        if not text:
            return []
        raise self._refusal()

    def _refusal(self) -> RefusedError:
        return RefusedError(
            f"{self._where} has no tokenizer (tokenizer.json, tokenizer.model, tekken.json, or vocab.json with "
            "merges.txt); give token ids instead"
        )


class TextStream:
    """Decodes an answer token by token; what it has given out is always a prefix of the whole answer's text."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str]) -> None:
        """`shown`: control tokens that are written out."""
        self._tokenizer, self._shown = tokenizer, shown
        self._token_ids: list[int] = []
        self._given_ids = 0  # tokens whose text is out
        self._context_ids = 0  # where decoding starts: a decoder may treat a text's first token differently

    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a UTF-8 character is incomplete."""
        if token_id in self._shown:
            text = self._pending() + self._shown[token_id]
            self._token_ids.append(token_id)
            self._given_ids = len(self._token_ids)
            return text
        self._token_ids.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):  # nothing to see is no context either: it may be a control token
            return ""
        self._context_ids, self._given_ids = self._given_ids, len(self._token_ids)
        return text

    def finish(self) -> str:
        """What is left at the answer's end; an incomplete character becomes U+FFFD."""
        return self._pending()

    def _pending(self) -> str:
        given = self._tokenizer.decode_again(tuple(self._token_ids[self._context_ids : self._given_ids]))
        text = self._tokenizer.decode(self._token_ids[self._context_ids :])
        if text.startswith(given):
            return text[len(given) :]
        # A stray byte token behind a whole character made of bytes: the decoder then reads none of them.
        return self._tokenizer.decode(self._token_ids[self._given_ids :])


def byte_level_bpe(
    tokens: Sequence[str],
    merges: Sequence[str],
    *,
    split: str,
    control_ids: Sequence[int],
    added_ids: Sequence[int] = (),
) -> Backend:
    """A byte-level BPE tokenizer from its tables.

    Args:
        tokens: the vocabulary in id order.
        merges: "left right", best first.
        split: llama.cpp's name for how text is split before merging, one of PRE_TOKENIZERS.
        control_ids: tokens that stand for no text.
        added_ids: tokens that are text but never come out of a merge.

    Raises RefusedError for a split that is not known.
    """
    before = pre_tokenizer(split)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=before.ignore_merges))
    if before.normalizer is not None:
        backend.normalizer = before.normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(before.steps))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in control_ids])
    backend.add_tokens([AddedToken(tokens[i], normalized=False) for i in added_ids])
    return backend
