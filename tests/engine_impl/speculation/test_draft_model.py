"""A draft model beside the model: what it says changes no token, and its cache has a row where the model's has one."""

from dataclasses import replace

import numpy as np
import pytest
from slipstream.engine_impl.draft_model import check_same_tokens, draft_model
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session

from ..tiny_models import TINY, tiny_engine
from .steps import told_by
from .test_steps import OPENINGS, PROMPT, TOKENS, plain, with_tokenizer, without_drafts

__all__ = ["plain", "without_drafts"]

STRANGER = replace(TINY, num_layers=1, num_kv_heads=2, head_dim=8, ffn_dim=32)
"""Of other sizes; what it says is mostly wrong."""


@pytest.fixture(scope="module")
def itself():
    """A draft model that is the model: all it says is right, for whatever is asked."""
    engine, params = tiny_engine(speculate="auto", draft=TINY)
    return with_tokenizer(engine), params


@pytest.fixture(scope="module")
def stranger():
    engine, params = tiny_engine(speculate="auto", draft=STRANGER)
    return with_tokenizer(engine), params


@pytest.mark.parametrize("widths", [4, [1, 4, 1, 1, 4]], ids=["4", "1 and 4"])
def test_what_a_perfect_draft_model_says_is_accepted(plain, itself, widths):
    """Greedy, drawn, penalised and held: it chooses by the slot's own parameters and key. After steps of any width its
    cache has no holes: a wide step behind them is right throughout."""
    told, session = told_by(itself, OPENINGS, TOKENS, widths)
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    for one in told:
        assert set(one.counts[1:]) <= ({4} if widths == 4 else {1, 4})
        assert len(one.counts) < TOKENS / 2
    check_rows_of_both(session)


def test_what_a_stranger_says_changes_nothing(plain, stranger):
    """But for the steps that it takes."""
    told, session = told_by(stranger, OPENINGS, TOKENS, 4)
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    assert len(told[0].counts) > TOKENS / 2
    check_rows_of_both(session)


def check_rows_of_both(session):
    """All rows up to a slot's length are there in both caches."""
    for cache in (session.state.cache, session.state.draft_cache):
        for slot in session.slots:
            pages = np.asarray(cache.rows)[:, session.page_BJ[slot]].swapaxes(1, 2)
            rows = pages.reshape(*pages.shape[:2], -1, pages.shape[-1])
            assert np.isfinite(rows[:, :, : int(session.state.length_B[slot])]).all()


def test_a_prediction_goes_before_what_the_model_says(plain, stranger):
    answer = plain[0].tokens
    cases = [(PROMPT, SamplingParams(), answer), (PROMPT, SamplingParams(), ())]
    (told, _), _ = told_by(stranger, cases, TOKENS, 4)
    assert told.tokens == answer
    assert set(told.counts[1:9]) == {4}


def test_both_caches_share_the_pages(itself):
    engine, params = itself
    ours, theirs = engine.programs.cache_layouts
    assert (ours.pages, ours.page_rows, ours.slots) == (theirs.pages, theirs.page_rows, theirs.slots)
    assert engine.programs.cache_bytes == ours.bytes + theirs.bytes
    session = Session(engine, params)
    session.page_BJ = session.page_BJ[::-1].copy()
    session.start(0, PROMPT)
    assert session.state.draft_cache is not None
    rows = np.asarray(session.state.draft_cache.rows)
    assert rows[:, 3].any()
    assert not rows[:, :3].any()


@pytest.mark.slow
def test_devices_share_a_draft_model_too(plain):
    """Its kv heads are repeated where there are fewer than devices."""
    loaded = tiny_engine(replace(TINY, num_kv_heads=4), devices=8, speculate="auto", draft=TINY)
    with_tokenizer(loaded[0])
    told, _ = told_by(loaded, OPENINGS, TOKENS, 4)
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    assert set(told[0].counts[1:]) == {4}


def test_a_draft_model_whose_heads_the_devices_do_not_divide_is_refused():
    engine, _ = tiny_engine(devices=4)
    config = replace(engine_config(), draft_model="small")
    shape = replace(TINY, num_heads=6, num_kv_heads=3)
    with pytest.raises(RefusedError, match=r"'small' has 6 query heads and 3 kv heads, which 4 .*parallel 1 or 3"):
        draft_model(config, shape, None, engine.mesh, 128)


def engine_config():
    from slipstream.engine_impl.config import EngineConfig

    return EngineConfig(slots=1, cache_length=128, cache_tokens=128, speculate="auto")


class Tokens:
    """A tokenizer, as far as it is compared."""

    def __init__(self, *tokens):
        self.vocab_size, self._tokens = len(tokens), tokens

    def token(self, token_id):
        return self._tokens[token_id] if token_id < self.vocab_size else ""


def test_another_tokenizer_is_refused():
    ours = Tokens("a", "b", "c", "")
    check_same_tokens(ours, Tokens("a", "b", "c"), "small")  # a vocabulary may be padded
    for theirs, message in (
        (Tokens("a", "x", "c", ""), "draft_model='small' has another tokenizer: token 1 is 'x' there and 'b' in the m"),
        (Tokens("a", "b"), "token 2 is '' there and 'c' in"),
        (Tokens("a", "b", "c", "", "d"), "token 4 is 'd' there and '' in"),
    ):
        with pytest.raises(RefusedError, match=message):
            check_same_tokens(ours, theirs, "small")
