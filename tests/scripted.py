"""A fake engine that answers every chat with one text, and its tokenizer: a token is a byte, as in fakes.py."""

from collections.abc import Iterable

import numpy as np
from slipstream.engine_impl.text.chat import Chat, TemplateFacts

from tests.fakes import VOCAB_SIZE, FakeEngine, FakeMatcher, FakeTokenizer

END = 255
BEGINS = "\x01"
"""Ends every prompt."""


class Anything(FakeMatcher):
    """The grammar of all texts: the script is what it should be."""

    def copy(self) -> "Anything":
        return self

    def take(self, token_id: int) -> None:
        pass

    def allowed(self, end_ids: Iterable[int]) -> np.ndarray:
        return np.full(VOCAB_SIZE // 32, 0xFFFFFFFF, np.uint32)


class ScriptedTokenizer(FakeTokenizer):
    stop_ids = frozenset({END})

    def __init__(self, template_facts: TemplateFacts) -> None:
        super().__init__(template_facts)
        self.grammars: list[str] = []
        """All that were asked for."""

    def matcher(self, grammar: str) -> Anything:
        self.grammars.append(grammar)
        return Anything(grammar)

    def render_chat(self, chat: Chat) -> str:
        return super().render_chat(chat) + BEGINS


class Scripted(FakeEngine):
    """`script` is what it answers, over and over the next character."""

    def __init__(self, script: str, template_facts: TemplateFacts = TemplateFacts(), **more) -> None:  # noqa: B008
        super().__init__(max_prefill_length=64, prefill_chunk=64, cache_length=512, **more)
        self.script, self.tokenizer = script, ScriptedTokenizer(template_facts)

    def get_tokenizer(self) -> ScriptedTokenizer:
        return self.tokenizer

    def next_token(self, text):
        written = list(text)[::-1].index(ord(BEGINS))
        return ord(self.script[written]) if written < len(self.script) else END

    def next_tokens(self, state, token_N, length_N, page_NJ):
        texts = [state.row_PR[page_J].reshape(-1)[:length] for length, page_J in zip(length_N, page_NJ, strict=True)]
        return np.array([self.next_token(text.tolist()) for text in texts], int)
