"""What the engine can take: a request beyond it is refused with both numbers and the remedy."""

from dataclasses import replace

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.request.request import Limits, Request

from tests.fakes import FakeEngine

LIMITS = Limits.of(FakeEngine(max_prefill_length=64, cache_length=64, page_rows=16, pages=8))
SMALL_POOL = replace(LIMITS, pool_tokens=48)


def asked(length, max_tokens, **more):
    return Request(prompt_ids=[1] * length, max_tokens=max_tokens, deliver=print, **more)


def test_they_are_the_engines():
    assert (LIMITS.pool_tokens, LIMITS.cache_length, LIMITS.longest) == (128, 64, 64)
    assert SMALL_POOL.longest == 48


@pytest.mark.parametrize("pool_tokens", [48, 64, 128])
def test_prompt_and_answer_may_fill_a_slot_or_the_pool(pool_tokens):
    limits = replace(LIMITS, pool_tokens=pool_tokens)
    for length in (1, limits.longest - 1):
        limits.check(asked(length, limits.longest - length))
        with pytest.raises(RefusedError, match=f"ask for at most {limits.longest - length} tokens"):
            limits.check(asked(length, limits.longest - length + 1))


def test_each_sample_may_fill_the_pool_for_itself():
    """They can run one after the other."""
    SMALL_POOL.check(asked(8, 40, num_samples=2))


@pytest.mark.parametrize(
    ("limits", "length", "max_tokens", "message", "remedy"),
    [
        (LIMITS, 65, 1, "the prompt has 65 tokens, at most 64 are taken", "shorten the prompt"),
        (LIMITS, 64, 1, "a prompt of 64 tokens and max_tokens=1 exceed cache_length=64", "shorten the prompt"),
        (LIMITS, 60, 5, "a prompt of 60 tokens and max_tokens=5 exceed cache_length=64", "ask for at most 4 tokens"),
        (
            SMALL_POOL,
            40,
            9,
            "a prompt of 40 tokens and max_tokens=9 exceed cache_tokens=48",
            "ask for at most 8 tokens",
        ),
        (SMALL_POOL, 50, 1, "a prompt of 50 tokens and max_tokens=1 exceed cache_tokens=48", "shorten the prompt"),
    ],
)
def test_what_can_never_fit_is_refused_with_both_numbers(limits, length, max_tokens, message, remedy):
    flag = "--cache-tokens" if limits is SMALL_POOL else "--cache-length"
    with pytest.raises(RefusedError, match=f"^{message}; {remedy} or serve with a larger {flag}$"):
        limits.check(asked(length, max_tokens))
