"""What the engine can take: a request beyond it is refused with both numbers and the remedy."""

from dataclasses import replace

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.request.limits import Limits
from slipstream.server.request.request import Request

from tests.fakes import FakeEngine

LIMITS = Limits.of(FakeEngine(max_prefill_length=64, cache_length=64, page_rows=16, pages=8))
SMALL_POOL = replace(LIMITS, pages=3)


def asked(length, max_tokens, **more):
    return Request(prompt_ids=[1] * length, max_tokens=max_tokens, deliver=print, **more)


def test_they_are_the_engines():
    assert (LIMITS.pool_tokens, LIMITS.cache_length, LIMITS.longest) == (128, 64, 64)
    assert (SMALL_POOL.pool_tokens, SMALL_POOL.longest) == (48, 48)


@pytest.mark.parametrize("pages", [3, 4, 8])
def test_prompt_and_answer_may_fill_a_slot_or_the_pool(pages):
    limits = replace(LIMITS, pages=pages)
    for length in (1, limits.longest - 1):
        limits.check(asked(length, limits.longest - length))
        with pytest.raises(RefusedError, match=f"ask for at most {limits.longest - length} tokens"):
            limits.check(asked(length, limits.longest - length + 1))


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


def test_steps_of_several_tokens_need_room_ahead_where_the_pool_is_less_than_a_slot():
    """The last step is started while the one before it, of up to three tokens too, is not read."""
    assert replace(LIMITS, tokens_per_step=3).longest == 64
    limits = replace(SMALL_POOL, tokens_per_step=3)
    limits.check(asked(40, limits.longest - 40))
    with pytest.raises(
        RefusedError, match="exceed cache_tokens=48 less 4 that steps need ahead; ask for at most 4 tok"
    ):
        limits.check(asked(40, limits.longest - 39))


def test_a_bound_on_prompts_alone_is_told_by_its_flag():
    with pytest.raises(RefusedError, match=r"the prompt has 33 tokens, at most 32 .* a larger --max-prefill-length$"):
        replace(LIMITS, max_prefill_length=32).check(asked(33, 1))


@pytest.mark.parametrize(
    ("length", "pages"),
    [
        (8, 2),  # a page each
        (16, 4),  # the first token needs a second one, and the prompt's page is of its last piece
        (32, 5),  # a page is shared, two are not
        (40, 4),  # two are shared
    ],
)
def test_samples_share_the_pages_before_a_prompts_last_piece_when_they_start(length, pages):
    """Then each may fill the pool for itself."""
    fitting, small = replace(LIMITS, pages=pages), replace(LIMITS, pages=pages - 1)
    most = fitting.longest - length
    fitting.check(asked(length, most, num_samples=2))
    message = (
        f"^num_samples=2 of a prompt of {length} tokens need {16 * pages} tokens in whole pages to start and exceed "
        f"cache_tokens={16 * pages - 16}; ask for fewer samples or serve with a larger --cache-tokens$"
    )
    with pytest.raises(RefusedError, match=message):
        small.check(asked(length, min(2, small.longest - length), num_samples=2))
    small.check(asked(length, 1, num_samples=2))  # no sample decodes


def test_samples_page_tables_have_a_bound_too():
    limits = replace(LIMITS, table_entries=5)
    limits.check(asked(8, 9, num_samples=2))
    with pytest.raises(
        RefusedError, match=r"2 of a prompt of 40 tokens need 6 entries of page tables, and there are 5; ask"
    ):
        limits.check(asked(40, 9, num_samples=2))
