"""A request's tokens depend neither on which pages it has, nor on what lies in any other, nor on how its text came into
them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.api import Opening, Piece
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.shapes import Shapes
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from .tiny_models import TINY, greedy, tiny_engine

LENGTH, R, SLOTS = 512, 128, 4
PROMPTS = [[n * 7 % 101 for n in range(length)] for length in (120, 5, 250)]
STEPS = 20  # the first slot and the last go over a page's border


def poisoned(session):
    """The session, whose cache is NaN but for the pages in use; codes, which know none, have NaN scales."""
    used = [page for slot in session.slots for page in session.page_BJ[slot, : pages_of(session, slot)]]

    def poison(leaf):
        is_free_P = np.ones(leaf.shape[1], bool)
        is_free_P[used] = False
        value = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 99
        return jax.device_put(jnp.where(is_free_P[:, None, None, None], value, leaf).astype(leaf.dtype), leaf.sharding)

    session.state = replace(session.state, cache=jax.tree.map(poison, session.state.cache))
    return session


def pages_of(session, slot):
    return -(-int(session.state.length_B[slot]) // session.engine.sizes.page_rows)


def scattered(engine, params, seed=3):
    """A poisoned session, whose slots have pages in no order."""
    session = Session(engine, params)
    session.page_BJ = np.random.default_rng(seed).permutation(session.page_BJ.reshape(-1)).reshape(SLOTS, -1)
    return poisoned(session)


def tokens(result):
    return np.asarray(result.token_BW)[:, 0].tolist()


def answers(session, prompts, steps, sampling=SamplingParams()):  # noqa: B008
    """Prompt i in slot i, all decoded together."""
    told = [[tokens(session.start(slot, prompt, sampling))[0] for slot, prompt in enumerate(prompts)]]
    told += [tokens(session.step())[: len(prompts)] for _ in range(steps - 1)]
    return np.array(told).T.tolist()


def next_tokens(session, slot, steps):
    """Of a slot alone."""
    session.slots = [slot]
    return [tokens(session.step())[0] for _ in range(steps)]


def pages_at(session, pages):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, list(pages)], session.state.cache)


@pytest.fixture(scope="module")
def tiny():
    return _engine(R)


@pytest.mark.parametrize(
    ("devices", "quantize_kv", "rows"),
    [
        (1, "none", 64),
        pytest.param(1, "none", R, marks=pytest.mark.slow),  # as the chunks below have them
        pytest.param(1, "int8", R, marks=pytest.mark.slow),
        pytest.param(8, "none", R, marks=pytest.mark.slow),
    ],
)
def test_any_pages_give_the_same_tokens(devices, quantize_kv, rows):
    """NaN in every page and row that no slot has filled."""
    config = replace(TINY, num_kv_heads=8) if devices > 1 else TINY
    engine, params = tiny_engine(
        config, devices=devices, slots=SLOTS, cache_length=384, quantize_kv=quantize_kv, page_rows=rows
    )
    assert engine.layout.shape[1:4:2] == (SLOTS * 384 // rows, rows)
    expected = greedy(engine, params, PROMPTS, STEPS)
    assert len({*expected[0]}) > 5, "a model that repeats itself would prove little"
    assert answers(scattered(engine, params), PROMPTS, STEPS) == expected


@pytest.mark.parametrize(
    ("length", "chunk"),
    [
        *((length, 128) for length in (1, 127, 128, 129, 256, 400)),
        *((length, 256) for length in (129, 256, 400)),
        pytest.param(400, 384, marks=pytest.mark.slow),
    ],
)
def test_chunks_of_any_size_give_the_tokens_of_one_piece(length, chunk):
    """And the rows: of prompts within a page, of whole pages, and one token more or less."""
    prompt = [n * 5 % 101 for n in range(length)]
    whole = Session(*_engine(LENGTH))
    expected = answers(whole, [prompt], STEPS)
    session = scattered(*_engine(chunk))
    assert answers(session, [prompt], STEPS) == expected
    assert len({*expected[0]}) > 5
    pages = -(-length // R)
    ours, theirs = pages_at(session, session.page_BJ[0, :pages]).rows, pages_at(whole, whole.page_BJ[0, :pages]).rows
    last = length - (pages - 1) * R
    np.testing.assert_allclose(ours[:, :-1], theirs[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[:, -1, :, :last], theirs[:, -1, :, :last], rtol=1e-4, atol=1e-5)


@functools.cache
def _engine(chunk):
    engine, params = tiny_engine(slots=SLOTS, cache_length=LENGTH, prefill_chunk=chunk)
    engine.get_tokenizer = lambda: NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({3}))
    return engine, params


@pytest.mark.parametrize(
    "asked",
    [
        SamplingParams(temperature=0.9, top_k=30, min_p=0.01, seed=5, logprobs=3),
        SamplingParams(repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.3, logprobs=0),
        SamplingParams(min_tokens=8, stop_token_ids=(12, 60, 88), logit_bias={12: 4.0, 60: 3.0}, logprobs=1),
    ],
    ids=["drawn", "penalised", "held"],
)
def test_chunks_change_neither_what_is_chosen_nor_what_is_told(asked):
    """A token behind a chunk is the next one's first: its log-probability is told with the chunk."""
    prompt, told = [n * 5 % 101 for n in range(300)], []
    for chunk in (128, LENGTH):
        session = scattered(*_engine(chunk))
        pieces = [np.asarray(prefix.logprob_NT)[0] for prefix in session.prefill(1, prompt, next_id=7)]
        results = [session.start(1, prompt, asked), *(session.step() for _ in range(11))]
        answer = [tokens(result)[0] for result in results]
        logprobs = [float(np.asarray(result.logprob_BW)[0, 0]) for result in results]
        told.append((np.concatenate(pieces)[: len(prompt)], logprobs, answer))
    (ours_T, our_logprobs, ours), (theirs_T, their_logprobs, theirs) = told
    assert ours == theirs
    assert len({*ours}) > 5
    np.testing.assert_allclose(ours_T, theirs_T, rtol=1e-3, atol=1e-4)
    assert ours_T.all(), "none is left out"
    np.testing.assert_allclose(our_logprobs, their_logprobs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [1, 2])
def test_shared_pages_give_the_tokens_of_own_ones_and_keep_their_bits(tiny, shared):
    """One slot reads a prefix that another computed, and goes on behind it; both decode."""
    engine, params = tiny
    prompt = [n * 5 % 101 for n in range(shared * R)]
    texts = [[*prompt, 3, 1, 4], prompt + [2, 7] * 40]
    expected = answers(Session(engine, params), texts, STEPS)
    session = scattered(engine, params)
    first = tokens(session.start(0, texts[0]))
    session.page_BJ[1, :shared] = session.page_BJ[0, :shared]
    before = pages_at(session, session.page_BJ[0, :shared])
    piece = Piece(token_T=np.array(texts[1][shared * R :]), start=shared * R, page_J=session.page_BJ[1])
    prefix = engine.prefill(params, session.state, [piece])
    opening = Opening(text=texts[1], prompt_length=len(texts[1]), sampling=SamplingParams())
    prefix, second = engine.first_tokens(prefix, [opening])
    session.insert(prefix, 1)
    told = [first + tokens(second), *(tokens(session.step())[:2] for _ in range(STEPS - 1))]
    assert np.array(told).T.tolist() == expected
    jax.tree.map(np.testing.assert_array_equal, pages_at(session, session.page_BJ[0, :shared]), before)


def test_the_pages_of_an_answer_serve_the_next_turn(tiny):
    """Prompt and answer, then a new question: decoded rows are read as if they were the prompt's."""
    engine, params = tiny
    session = scattered(engine, params)
    prompt = [n * 3 % 101 for n in range(100)]
    answer = answers(session, [prompt], 60)[0]
    text = prompt + answer[:-1] + [7, 8, 9]
    (expected,) = answers(Session(engine, params), [text], STEPS)
    session.page_BJ[2, 0] = session.page_BJ[0, 0]
    piece = Piece(token_T=np.array(text[R:]), start=R, page_J=session.page_BJ[2])
    opening = Opening(text=text, prompt_length=len(text), sampling=SamplingParams())
    prefix, first = engine.first_tokens(engine.prefill(params, session.state, [piece]), [opening])
    session.insert(prefix, 2)
    assert [*tokens(first), *next_tokens(session, 2, STEPS - 1)] == expected


@pytest.mark.parametrize("count", [2, 3, 4])
def test_short_texts_prefilled_together_are_as_alone(tiny, count):
    """Of different lengths; one of them goes on behind a page that is there, one is not complete."""
    engine, params = tiny
    assert engine.sizes.prefill_batch == (4, 4, 32)
    long = [n * 5 % 101 for n in range(R + 17)]
    texts = [[5, 17, 80], long, [9] * 32, [1]][:count]
    expected = answers(Session(engine, params), texts, STEPS)
    session = scattered(engine, params)
    session.insert(session.prefilled(1, long[:R]), 1, is_last=False)
    pieces = [
        Piece(token_T=np.array(text[start:]), start=start, page_J=session.page_BJ[slot])
        for slot, (text, start) in enumerate(zip(texts, [0, R, 0, 0], strict=False))
    ]
    openings = [Opening(text=text, prompt_length=len(text), sampling=SamplingParams()) for text in texts]
    prefix, first = engine.first_tokens(engine.prefill(params, session.state, pieces), openings[:-1])
    assert first.count_B.tolist() == [1] * (count - 1) + [0] * (5 - count)
    prefix, first = engine.first_tokens(prefix, openings)
    session.state = engine.insert(prefix, session.state, range(count), session.page_BJ[:count])
    session.slots = list(range(count))
    told = [tokens(first)[:count], *(tokens(session.step())[:count] for _ in range(STEPS - 1))]
    assert np.array(told).T.tolist() == expected


def test_a_prompt_fills_its_own_pages_alone():
    """A piece's padding goes no further than the text's last page: the next may be another's."""
    session = Session(*_engine(LENGTH))
    session.page_BJ[0] = [5, 6, 0, 0]
    poisoned(session)
    session.start(0, [n * 7 % 101 for n in range(R + 12)])  # padded to 256
    is_nan_P = np.asarray(jnp.isnan(session.state.cache.rows).any(axis=(0, 2, 3, 4)))
    assert set(np.flatnonzero(~is_nan_P).tolist()) <= {5, 6}
    assert not is_nan_P[5]


def test_what_fills_up_a_batch_of_prompts_fills_no_page(tiny):
    """Two pieces in a program of four: the others' rows go nowhere, not into page 0 either."""
    engine, params = tiny
    session = poisoned(Session(engine, params))
    table_NJ = np.zeros_like(session.page_BJ[:2])
    table_NJ[:, 0] = 5, 6
    pieces = [Piece(token_T=np.array([7, 8, 9]), start=0, page_J=page_J) for page_J in table_NJ]
    session.state = engine.insert(engine.prefill(params, session.state, pieces), session.state, [None] * 2, table_NJ)
    is_nan_P = np.asarray(jnp.isnan(session.state.cache.rows).any(axis=(0, 2, 4)).all(axis=1))
    assert np.flatnonzero(~is_nan_P).tolist() == [5, 6]


def test_a_step_writes_one_row_of_one_page_per_live_slot(tiny):
    """Two slots with one first page, each with its own second."""
    engine, params = tiny
    session = Session(engine, params)
    session.page_BJ[:2] = [[5, 2, 0, 0], [5, 7, 0, 0]]
    prompt = [n * 7 % 101 for n in range(R)]
    for slot in (0, 1):
        session.start(slot, prompt)
    before = np.array(session.state.cache.rows)
    told = tokens(session.step())
    after = np.array(session.state.cache.rows)
    assert told[0] == told[1] >= 0
    changed = np.argwhere((before != after).any(axis=(0, 2, 4)))
    assert changed.tolist() == [[2, 0], [7, 0]]


@pytest.mark.parametrize(
    ("starts", "lengths", "message"),
    [
        ([0], [R + 1], r"pieces of \[129\] tokens are not prefilled together: one has at most 128, 4 have at most 32"),
        ([0, 0], [33, 1], r"pieces of \[33, 1\] tokens"),
        ([0] * 5, [1] * 5, r"pieces of \[1, 1, 1, 1, 1\] tokens"),
        ([0], [0], "and none empty"),
        ([], [], "one at least"),
        ([64], [3], "piece.start=64 must be a multiple of page_rows=128"),
    ],
)
def test_pieces_that_no_program_takes_are_told(tiny, starts, lengths, message):
    page_J = np.zeros(4, np.int32)
    pieces = [
        Piece(token_T=np.zeros(length, np.int32), start=start, page_J=page_J)
        for start, length in zip(starts, lengths, strict=True)
    ]
    with pytest.raises(ValueError, match=message):
        tiny[0].shapes.pieces(pieces)


@pytest.mark.parametrize(
    ("platform", "slots", "chunk", "prefills", "steps"),
    [
        ("cpu", 1, 128, ((1, 16), (1, 64), (1, 128)), (1,)),
        ("cpu", 3, 128, ((1, 16), (1, 64), (1, 128)), (1, 3)),
        ("cpu", 8, 256, ((1, 16), (1, 64), (1, 256), (8, 32)), (1, 8)),
        ("cpu", 32, 128, ((1, 16), (1, 64), (1, 128), (8, 32)), (1, 8, 32)),
        ("gpu", 40, 512, ((1, 16), (1, 64), (1, 256), (1, 512), (8, 64)), (1, 8, 32, 40)),
        ("tpu", 3, 512, ((1, 16), (1, 64), (1, 256), (1, 512), (3, 64)), (3,)),
        ("tpu", 256, 4096, ((1, 16), (1, 64), (1, 256), (1, 1024), (1, 4096), (8, 64)), (8, 32, 128, 256)),
    ],
)
def test_programs_have_few_shapes(platform, slots, chunk, prefills, steps):
    shapes = Shapes(slots=slots, pages_per_slot=4, page_rows=128, chunk=chunk, platform=platform)
    assert (shapes.prefills, shapes.steps) == (prefills, steps)


@pytest.mark.parametrize(
    ("platform", "slots", "wide"),
    [
        ("cpu", 1, ((1, 4), (1, 8))),
        ("cpu", 4, ((4, 2), (1, 4), (4, 4), (1, 8))),
        ("cpu", 8, ((8, 2), (1, 4), (8, 4), (1, 8))),
        ("cpu", 16, ((8, 2), (1, 4), (8, 4), (1, 8))),
        ("gpu", 256, ((1, 4), (8, 4), (32, 4), (1, 8), (8, 8), (32, 8))),
        ("tpu", 256, ((8, 4), (32, 4), (8, 8), (32, 8))),
        ("tpu", 100, ((8, 4), (32, 4), (8, 8), (32, 8))),
        ("tpu", 64, ((8, 4), (32, 4), (64, 4), (8, 8), (32, 8))),
        ("tpu", 512, ((8, 4), (32, 4), (8, 8), (32, 8))),
    ],
)
def test_steps_of_few_slots_are_wide_where_something_drafts(platform, slots, wide):
    shapes = Shapes(slots=slots, pages_per_slot=4, page_rows=128, chunk=256, platform=platform, speculates=True)
    assert (shapes.wide_steps, shapes.widths) == (wide, (1, *sorted({width for _, width in wide})))
    quiet = replace(shapes, speculates=False)
    assert (quiet.wide_steps, quiet.widths, quiet.steps) == ((), (1,), shapes.steps)


def test_a_step_of_many_slots_is_narrower_than_it_was_asked_for():
    shapes = Shapes(slots=64, pages_per_slot=4, page_rows=128, chunk=256, platform="tpu", speculates=True)
    for slots, asked, width, size in ((1, 8, 8, 8), (32, 8, 8, 32), (33, 8, 4, 64), (33, 4, 4, 64), (33, 1, 1, 64)):
        assert shapes.width_of(slots, asked) == width
        assert len(shapes.step(np.arange(slots))) == size
    assert replace(shapes, slots=256).width_of(33, 8) == 1
    assert replace(shapes, slots=8, platform="cpu").width_of(1, 2) == 1, "not a wide step of more slots instead"
    with pytest.raises(ValueError, match=r"width=2 must be one of \(1, 4, 8\)"):
        shapes.width_of(1, 2)


def test_a_step_has_the_smallest_size_that_holds_its_slots():
    shapes = Shapes(slots=40, pages_per_slot=4, page_rows=128, chunk=256)
    for count, size in ((0, 1), (1, 1), (2, 8), (8, 8), (9, 32), (17, 32), (33, 40), (40, 40)):
        slot_N = shapes.step(np.arange(count))
        assert slot_N.tolist() == [*range(count), *[40] * (size - count)]
    with pytest.raises(ValueError, match="41 slots are named, there are 40"):
        shapes.step(np.arange(41))
