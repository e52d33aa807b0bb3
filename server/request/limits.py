"""What a server takes: a request beyond it is refused before it waits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...engine_impl.errors import RefusedError, TooLongError
from ...engine_impl.text.chat import Chat, ChatPrompt
from .request import Request

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine
    from ...engine_impl.api import Tokenizer

MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS = 2048, 10_000, 1000
"""Prompts of one call, messages of a conversation, parts of a message (count). What is beyond is no request but a way
to keep its reader busy."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the engine can take. A request within them can be answered, by a server that has nothing else to do."""

    vocab_size: int
    max_prefill_length: int
    """Longest prompt (tokens)."""
    cache_length: int
    """Prompt and answer of one sample together (tokens)."""
    slots: int
    prefill_chunk: int
    """Of a prompt, that are computed together (tokens)."""
    page_rows: int
    """Of a page (tokens)."""
    pages: int
    table_entries: int
    """Of the page tables of all samples that run."""
    tokens_per_step: int
    """Most that a step brings a sample; 1: nothing drafts."""

    @classmethod
    def of(cls, engine: "Engine") -> "Limits":
        sizes = engine.sizes
        return cls(
            vocab_size=engine.get_tokenizer().vocab_size,
            max_prefill_length=sizes.max_prefill_length,
            cache_length=sizes.cache_length,
            slots=sizes.slots,
            prefill_chunk=sizes.prefill_chunk,
            page_rows=sizes.page_rows,
            pages=sizes.pages,
            table_entries=sizes.table_entries,
            tokens_per_step=sizes.tokens_per_step,
        )

    def ids_of_text(self, tokenizer: "Tokenizer", text: str, *, with_first: bool = True) -> list[int]:
        """Token ids of raw text, as Tokenizer.encode has them. Raises TooLongError for a text that is much too long,
        before all of it is read."""
        try:
            return tokenizer.encode(text, self.max_prefill_length, with_first=with_first)
        except TooLongError as error:
            raise self._too_long(f"more than {self.max_prefill_length}") from error

    def prompt_of_chat(self, tokenizer: "Tokenizer", chat: Chat) -> ChatPrompt:
        """A conversation in the model's form. Raises likewise, and what the chat template refuses."""
        try:
            return tokenizer.encode_chat(chat, self.max_prefill_length)
        except TooLongError as error:
            raise self._too_long(f"more than {self.max_prefill_length}") from error

    def ids_of_prediction(self, tokenizer: "Tokenizer", text: str | None) -> list[int]:
        """Token ids of a prediction, without what texts begin with. Raises RefusedError for one where nothing drafts,
        TooLongError for one that is longer than any answer."""
        if text is None:
            return []
        if self.tokens_per_step == 1:
            raise RefusedError(
                "prediction: this server does not speculate; leave it out or serve with --speculate auto"
            )
        refusal = f"prediction: more than {self.cache_length} tokens, which no answer has here; send a shorter one"
        try:
            token_ids = tokenizer.encode(text, self.cache_length, with_first=False)
        except TooLongError as error:
            raise TooLongError(refusal) from error
        if len(token_ids) > self.cache_length:
            raise TooLongError(refusal)
        return token_ids

    def check_count(self, count: int) -> None:
        """Raises RefusedError for a prompt of so many tokens."""
        if count > self.max_prefill_length:
            raise self._too_long(f"{count}")

    def check_ids(self, token_ids: Sequence[int]) -> None:
        """Raises RefusedError for one that the vocabulary lacks."""
        for position, token_id in enumerate(token_ids):
            self._check_id(token_id, f"token id {token_id} at position {position}")

    @property
    def pool_tokens(self) -> int:
        """What all pages hold."""
        return self.pages * self.page_rows

    @property
    def longest(self) -> int:
        """Prompt and answer of a sample that has the server for itself (tokens)."""
        return self.cache_length if self.cache_length <= self.pool_tokens else self.pool_tokens - self._ahead

    @property
    def _ahead(self) -> int:
        """Rows behind a sample's last token that must have pages: its last step is started while the one before it is
        not read, and of each one token is sure and `tokens_per_step` may come."""
        return 2 * (self.tokens_per_step - 1)

    def check(self, request: Request) -> None:
        """Raises RefusedError for a request that the engine cannot answer."""
        check_slots(request.num_samples, self.slots)
        length, max_tokens = len(request.prompt_ids), request.max_tokens
        if not length:
            raise RefusedError("the prompt is empty; send at least one token")
        self.check_count(length)
        check_room(length, max_tokens, "cache_length", self.cache_length)
        if self.longest < self.cache_length:
            check_room(length, max_tokens, "cache_tokens", self.pool_tokens, self._ahead)
        self._check_start(length, max(1, request.slots_needed))
        self.check_ids(request.prompt_ids)
        for token_id in request.sampling.logit_bias:
            self._check_id(token_id, f"logit_bias: token id {token_id}")

    def _too_long(self, count: str) -> TooLongError:
        flag = "--max-prefill-length" if self.max_prefill_length < self.cache_length else "--cache-length"
        return TooLongError(
            f"the prompt has {count} tokens, at most {self.max_prefill_length} are taken; "
            f"shorten the prompt or serve with a larger {flag}"
        )

    def _check_start(self, length: int, samples: int) -> None:
        """Samples start together: they share the pages before the prompt's last piece, and each has the others and room
        for a step. Later they may run one after the other."""
        each = self._pages_for(min(length + self.tokens_per_step, self.cache_length))
        shared = self._pages_for(length - self.prefill_chunk)
        asked, less = f"num_samples={samples} of a prompt of {length} tokens need", "ask for fewer samples"
        pages, entries = each + (samples - 1) * (each - shared), samples * each
        if pages > self.pages:
            raise RefusedError(
                f"{asked} {pages * self.page_rows} tokens in whole pages to start and exceed "
                f"cache_tokens={self.pool_tokens}; {less} or serve with a larger --cache-tokens"
            )
        if entries > self.table_entries:
            raise RefusedError(
                f"{asked} {entries} entries of page tables, and there are {self.table_entries}; "
                f"{less} or shorten the prompt"
            )

    def _pages_for(self, tokens: int) -> int:
        return max(0, -(-tokens // self.page_rows))

    def _check_id(self, token_id: int, what: str) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RefusedError(f"{what} is outside the vocabulary; ids go from 0 to {self.vocab_size - 1}")


def check_messages(count: int) -> None:
    """Raises RefusedError for a conversation of so many messages."""
    if not count:
        raise RefusedError("messages is empty; send at least one")
    if count > MAX_MESSAGES:
        raise RefusedError(f"messages has {count} entries and may have {MAX_MESSAGES}; send fewer")


def check_room(length: int, max_tokens: int, name: str, tokens: int, ahead: int = 0) -> None:
    """Raises TooLongError when prompt and answer exceed `tokens`, less those that steps need ahead; `name` is what
    bounds them, and its flag's."""
    room = tokens - ahead - length
    if max_tokens > room:
        less = f"ask for at most {room} tokens" if room > 0 else "shorten the prompt"
        kept = f" less {ahead} that steps need ahead" if ahead else ""
        raise TooLongError(
            f"a prompt of {length} tokens and {max_tokens=} exceed {name}={tokens}{kept}; "
            f"{less} or serve with a larger --{name.replace('_', '-')}"
        )


def check_slots(num_samples: int, slots: int) -> None:
    """Raises RefusedError when so many samples can never run together."""
    if num_samples > slots:
        raise RefusedError(
            f"{num_samples=} needs as many slots and the server has {slots}; "
            "ask for fewer samples or serve with more --slots"
        )
