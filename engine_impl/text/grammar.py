"""Grammars over a model's tokens, by llguidance, which this file alone imports.

A grammar comes from a stranger: it is compiled in a process of its own first, with bounds on its time and memory, and
again in this one only if it stood them. What a token costs later is bounded by LIMITS; a grammar that exceeds them ends
its own answer.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from tokenizers import Tokenizer as Backend

from ..errors import RefusedError
from ..runtime.workers import WorkerError, Workers

WORKERS = Workers(2, seconds=1.0, memory_mib=256, wait_s=10.0)
"""Where all grammars of this process are compiled first."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)
"""One token: 14 ms of the lexer and 3 ms of the parser. One answer: 40 MiB of lexer states."""
MAX_KEPT = 64
"""Grammars that stay compiled, and refusals that stay known (count); the one that was not asked for the longest goes
first."""
REASON = 400
"""The longest reason of a refusal that is passed on (characters)."""
NUMBERED = re.compile(r"<\[[\d,\s^-]+\]>")
"""Tokens by their ids, in a grammar. Whoever compiles without the model's vocabulary has none of those numbers."""


class Matcher:
    """An answer's place in its grammar: which tokens may come next. One thread at a time."""

    def __init__(self, matcher: LLMatcher, stop_ids: Sequence[int], vocab_size: int) -> None:
        self._matcher, self._stop_ids, self._vocab_size = matcher, stop_ids, vocab_size
        self.is_over = False
        """Whether the text is whole and nothing can follow; known when `allowed` was asked."""

    def copy(self) -> "Matcher":
        """Another answer at the same place."""
        return Matcher(self._matcher.deep_copy(), self._stop_ids, self._vocab_size)

    def take(self, token_id: int) -> None:
        """The answer goes on with this token. Without effect on one that has failed."""
        self._matcher.consume_token(token_id)

    def allowed(self, end_ids: Iterable[int]) -> np.ndarray:
        """u32 [W]: whether token v may come next is bit v % 32 of word v // 32; `end_ids`, which end the answer, may
        where the text is whole. Lets other threads run."""
        word_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: -(-self._vocab_size // 32)].copy()
        word_W[-1] &= np.uint32(2 ** ((self._vocab_size - 1) % 32 + 1) - 1)
        set_bits(word_W, self._stop_ids, False)
        is_whole = self._matcher.is_accepting() and not self._matcher.is_error()
        self.is_over = is_whole and not word_W.any()
        if is_whole:
            set_bits(word_W, [token_id for token_id in end_ids if token_id < self._vocab_size], True)
        return word_W

    @property
    def error(self) -> str:
        """Why nothing can be told of the answer any more; "" if it has not failed."""
        return reason_of(self._matcher.get_error())


def set_bits(word_W: np.ndarray, token_ids: Iterable[int], may_come: bool) -> None:
    """Of these tokens, in place."""
    for token_id in token_ids:
        bit = np.uint32(1 << token_id % 32)
        word_W[token_id // 32] = word_W[token_id // 32] | bit if may_come else word_W[token_id // 32] & ~bit


class Grammars:
    """Of one tokenizer. Safe to use from several threads."""

    def __init__(self, backend: Backend, stop_ids: Iterable[int], vocab_size: int) -> None:
        self._backend, self._vocab_size = backend, vocab_size
        # The library wants one at least: a model without loses its last token.
        self._stop_ids = sorted(token_id for token_id in stop_ids if token_id < vocab_size) or [vocab_size - 1]
        self._lock, self._preparing = threading.Lock(), threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Matcher] = OrderedDict()

    def prepare(self) -> LLTokenizer:
        """What is made once for all grammars; it keeps the interpreter (49,152 tokens: 0.3 s), so it is for the start.

        Raises RefusedError for a tokenizer that llguidance does not know.
        """
        with self._preparing:
            if self._tokenizer is None:
                try:
                    self._tokenizer = LLTokenizer(self._backend.to_str(), eos_token=self._stop_ids)
                except Exception as error:  # the library's reasons have no common name
                    raise RefusedError(f"this model's tokenizer takes no grammars: {reason_of(str(error))}") from error
            return self._tokenizer

    def matcher(self, text: str) -> Matcher:
        """At the beginning of an answer in the grammar `text`, see server/request/grammar.py.

        Raises RefusedError for a grammar that cannot be compiled, with the compiler's reason, or that takes too much.
        """
        with self._lock:
            if text in self._kept:
                self._kept.move_to_end(text)
                return self._kept[text].copy()
        matcher = self._compiled(text)
        with self._lock:
            self._kept[text] = matcher
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return matcher.copy()

    def _compiled(self, text: str) -> Matcher:
        tokenizer = self.prepare()
        added = self._backend.get_added_tokens_decoder().values()
        try:
            made = WORKERS.call(compile_aside, text, tuple(token.content for token in added if token.special))
        except WorkerError as error:
            raise RefusedError(
                f"the grammar {error} to compile; send a smaller or simpler schema or grammar"
            ) from error
        matcher = Matcher(LLMatcher(tokenizer, made, log_level=0, limits=LIMITS), self._stop_ids, self._vocab_size)
        matcher.allowed(())  # what the first token takes is told before any is generated
        if matcher.error:
            raise refusal(matcher.error)
        if matcher.is_over:
            raise RefusedError("the grammar allows no text but the empty one; send one that allows some")
        return matcher


class Bytes:
    """A vocabulary for whoever compiles without the model's: single bytes, and the names that a grammar may use."""

    is_tokenizer_wrapper = True
    bos_token_id, eos_token_id = None, 256

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"<eos>", *(name.encode() for name in special)]
        self.special_token_ids = list(range(self.eos_token_id, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def compile_aside(text: str, special: Sequence[str]) -> str:
    """In a worker: the grammar as it is compiled. Raises RefusedError."""
    grammars = json.loads(text)
    try:
        for grammar in grammars["grammars"]:
            if "lark_grammar" in grammar:
                grammar["lark_grammar"] = any_to_lark(grammar["lark_grammar"])
    except Exception as error:  # of GBNF's parser, whose errors have no common name
        raise refusal(str(error)) from error
    made = json.dumps(grammars)
    for grammar in grammars["grammars"]:
        if "lark_grammar" in grammar:
            grammar["lark_grammar"] = NUMBERED.sub(f"<[{Bytes.eos_token_id}]>", grammar["lark_grammar"])
    tokenizer: Any = Bytes(special)  # a duck that the library's stubs do not know
    matcher = LLMatcher(LLTokenizer(tokenizer, slices=[]), json.dumps(grammars), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise refusal(reason_of(matcher.get_error()))
    return made


def refusal(reason: str) -> RefusedError:
    return RefusedError(f"the grammar cannot be compiled: {reason}; leave out or mend what it names")


def reason_of(message: str) -> str:
    """The compiler's, on one line."""
    reason = " ".join(message.replace("<non-verbose/>", "").split())
    return "no text can go on in it" if reason.startswith("NoExtension") else reason[:REASON]
