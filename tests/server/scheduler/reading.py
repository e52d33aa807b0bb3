"""A fake engine whose tokens follow from what its pages hold: one that is mixed up, or read too early, changes them."""

from typing import Any

import numpy as np
from slipstream.engine_impl.sampling.params import SamplingParams

from tests.fakes import FakeEngine

FREE = SamplingParams(ignore_eos=True)


class Reading(FakeEngine):
    """The next token follows from the whole text, as the pages hold it."""

    def next_token(self, text):
        return answer(text)

    def next_tokens(self, state, token_N, length_N, page_NJ):
        next_N = []
        for token, length, page_J in zip(token_N, length_N, page_NJ, strict=True):
            row_S = state.row_PR[page_J].reshape(-1)[:length]
            assert (row_S >= 0).all(), "a row is read that was never stored"
            assert row_S[-1] == token
            next_N.append(answer(row_S.tolist()))
        return np.array(next_N, int)


def answer(text):
    """A letter that depends on every token and its place."""
    total = 0
    for token in text:
        total = (total * 31 + int(token) + 1) % 9973
    return ord("a") + total % 26


def expected(text, tokens):
    ids = list(text.encode())
    for _ in range(tokens):
        ids.append(answer(ids))
    return bytes(ids[len(text) :]).decode()


def reading(slots=4, **more):
    sizes: dict[str, Any] = {"page_rows": 4, "prefill_chunk": 8, "max_prefill_length": 64, "cache_length": 64}
    return Reading(max_concurrent_decodes=slots, **sizes | more)
