"""Steps of several tokens: no answer changes by them, whatever is drafted, and nothing of a rejected draft is kept."""

from dataclasses import replace

import numpy as np
import pytest
from slipstream.engine_impl.api import Allowed
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from ..tiny_models import tiny_engine
from .steps import script, scripted, told_by

PROMPT = [n * 7 % 101 for n in range(16)]  # as long as the smallest piece: no padding is stored behind it
TOKENS = 40
SAMPLINGS = [
    SamplingParams(logprobs=2),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=7, logprobs=0),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, temperature=0.3, seed=3),
    SamplingParams(min_tokens=30, stop_token_ids=(88, 69, 60, 48), logit_bias={27: 3.0, 60: 2.0}, logprobs=1),
]


def with_tokenizer(engine):
    engine.get_tokenizer = lambda: NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({3}))
    return engine


def with_widths(engine):
    """Of more tokens than a CPU's steps of so many slots have."""
    return twin(engine, shapes=replace(engine.shapes, wide={4: (4, 8)}))


OPENINGS = [(PROMPT, sampling, ()) for sampling in SAMPLINGS]


@pytest.fixture(scope="module")
def without_drafts():
    engine, params = tiny_engine()
    return with_tokenizer(engine), params


@pytest.fixture(scope="module")
def plain(without_drafts):
    """Told of each sampling without speculation."""
    told, _ = told_by(without_drafts, OPENINGS, TOKENS, 1)
    assert all(len({*one.tokens}) > 8 for one in told), "a model that repeats itself would prove little"
    return told


@pytest.fixture(scope="module")
def drafting():
    engine, params = tiny_engine(speculate="auto")
    return with_tokenizer(scripted(with_widths(engine))), params


def wrong(token):
    return (token + 1) % 101


SCRIPTS = {
    "right": lambda answer: answer,
    "wrong": lambda answer: [wrong(token) for token in answer],
    "none": lambda answer: [-1] * len(answer),
    **{
        f"wrong at {w}": lambda answer, w=w: [wrong(token) if n % 5 == w else token for n, token in enumerate(answer)]
        for w in range(5)
    },
    "few": lambda answer: [-1 if n % 3 == 2 else token for n, token in enumerate(answer)],
}


@pytest.mark.parametrize("drafts", SCRIPTS)
def test_no_draft_changes_what_is_told(plain, drafting, drafts):
    """Tokens, log-probabilities and the likeliest tokens of four slots, each with its own sampling; and rows of drafts
    that are rejected are nowhere stored."""
    scripts = [SCRIPTS[drafts](one.tokens[1:]) for one in plain]
    told, _ = told_by(drafting, OPENINGS, TOKENS, 4, scripts=scripts, checks_rows=True)
    for ours, theirs in zip(told, plain, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.tops == theirs.tops
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=1e-4)
    steps = {len(one.counts) for one in told}
    if drafts == "right":
        assert {*told[0].counts[1:]} == {4}
    if drafts in ("wrong", "none"):
        assert steps == {TOKENS}


def test_the_widest_step_changes_nothing_either(plain, drafting):
    told, _ = told_by(drafting, OPENINGS, TOKENS, 8, scripts=[one.tokens[1:] for one in plain])
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    assert {*told[0].counts[1:]} == {8}


def test_widths_may_change_from_step_to_step(plain, drafting):
    scripts = [SCRIPTS["wrong at 3"](one.tokens[1:]) for one in plain]
    told, _ = told_by(drafting, OPENINGS, TOKENS, [1, 4, 8, 1, 1, 8, 4], scripts=scripts)
    assert [one.tokens for one in told] == [one.tokens for one in plain]


def started(drafting, prompt, drafts):
    """A session whose slot 0 has these drafts; in another one, which comes first in a step's result, there are none."""
    session = Session(*drafting)
    session.start(1, PROMPT)
    session.start(0, prompt)
    script(session, 1, [])
    script(session, 0, drafts)
    return session


def test_a_result_tells_how_many_drafts_there_were_and_how_many_were_right(plain, drafting):
    answer = plain[0].tokens
    session, told = started(drafting, PROMPT, [*answer[1:6], wrong(answer[6]), *answer[7:13]]), []
    for width in (1, 4, 4, 8, 1):
        result = session.step(width)
        told.append([int(counts[1]) for counts in (result.drafted_B, result.agreed_B, result.count_B)])
        assert [int(counts[0]) for counts in (result.drafted_B, result.agreed_B, result.count_B)] == [0, 0, 1]
    # One would have been right; three are, and the fourth, which is wrong, took no part; then it does; behind it six
    # are right and no more there; none.
    assert told == [[1, 1, 1], [4, 4, 4], [4, 0, 1], [6, 6, 7], [0, 0, 1]]


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
def test_a_full_cache_ends_the_accepted_run(drafting, room):
    """Exactly there: its last token is told, nothing is stored behind, and the slot beside goes on."""
    engine, _ = drafting
    prompt = (PROMPT * 9)[: engine.sizes.cache_length - room]
    plain = started(drafting, prompt, [])
    expected = [int(plain.step().token_BW[1, 0]) for _ in range(room)]
    assert plain.step().count_B.tolist()[1] == 0
    session, told, steps = started(drafting, prompt, expected), [], 0
    while (count := int((result := session.step(4)).count_B[1])) > 0:
        told += np.asarray(result.token_BW)[1, :count].tolist()
        steps += 1
    assert told == expected
    assert steps == -(-room // 4)
    assert session.state.length_B.tolist()[:2] == [engine.sizes.cache_length, len(PROMPT) + steps + 1]


def words(*but):
    """All tokens may come but these."""
    allowed_V = np.ones(101, bool)
    allowed_V[list(but)] = False
    return np.packbits(np.pad(allowed_V, (0, 27)), bitorder="little").view(np.uint32)


@pytest.mark.parametrize("sampling", SAMPLINGS[:3], ids=["greedy", "drawn", "penalised"])
@pytest.mark.parametrize("forced", [0, 1, 2, 3, 6])
def test_a_row_with_a_mask_gets_what_must_come_and_one_token_behind(plain, drafting, sampling, forced):
    """Whatever is drafted for it: which token may come behind a draft is not known, but behind what must. Rows beside
    it get theirs."""
    forced_F, answer, likeliest = np.arange(40, 40 + forced, dtype=np.int32), plain[1].tokens, None
    told: dict[int, list[int]] = {}
    for width in (1, 4, 8):
        session = Session(*drafting)
        for slot in (0, 1):
            session.start(slot, PROMPT, (sampling, SAMPLINGS[1])[slot])
            script(session, slot, answer[1:])
        tokens, others = [], []
        while len(tokens) <= forced:
            left_F = forced_F[len(tokens) :]
            word_W = words() if likeliest is None else words(likeliest)
            allowed = Allowed(row_C=np.array([0], np.int32), forced_CF=left_F[None], word_CW=word_W[None])
            slot_N = np.array([0, 1], np.int32)
            session.state, result = session.engine.generate(
                session.params, session.state, slot_N, session.page_BJ[slot_N], allowed, width
            )
            count, other = result.count_B.tolist()[:2]
            assert (count, other) == (min(len(left_F) + 1, width), width)
            assert result.drafted_B.tolist()[:2] == [min(len(left_F), width - 1), width]
            assert result.agreed_B.tolist()[:2] == [count - 1, width]
            tokens += np.asarray(result.token_BW)[0, :count].tolist()
            others += np.asarray(result.token_BW)[1, :other].tolist()
        assert others == answer[1 : 1 + len(others)]
        assert tokens[:-1] == forced_F.tolist()
        told[width] = tokens
    assert told[1] == told[4] == told[8]
    likeliest = told[1][-1]


def test_what_must_come_and_may_not_ends_the_run(drafting):
    """A token that min_tokens forbids: what is chosen instead is told, and the host sees it."""
    session = Session(*drafting)
    session.start(0, PROMPT, SamplingParams(min_tokens=9, stop_token_ids=(41,)))
    script(session, 0, [])
    forced_CF, slot_N = np.array([[40, 41, 42]], np.int32), np.zeros(1, np.int32)
    allowed = Allowed(row_C=slot_N, forced_CF=forced_CF, word_CW=words()[None])
    session.state, result = session.engine.generate(
        session.params, session.state, slot_N, session.page_BJ[slot_N], allowed, 4
    )
    assert [int(counts[0]) for counts in (result.drafted_B, result.agreed_B, result.count_B)] == [3, 1, 2]
    assert int(result.token_BW[0, 0]) == 40 != int(result.token_BW[0, 1]) != 41


@pytest.fixture(scope="module")
def serving():
    """With the proposer that serves."""
    engine, params = tiny_engine(speculate="auto")
    return with_tokenizer(with_widths(engine)), params


@pytest.mark.parametrize("width", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_what_the_text_repeats_and_what_is_predicted_is_drafted(plain, serving, width):
    """A prediction that is right, one that is too long, a wrong one, and a prompt that asks for what it has."""
    answer = plain[0].tokens
    edited = [wrong(token) if n % 10 == 9 else token for n, token in enumerate(answer)]
    copied = PROMPT + answer + PROMPT
    cases = [(PROMPT, SAMPLINGS[0], prediction) for prediction in (answer, [*answer, *range(101)], edited)]
    cases.append((copied, SAMPLINGS[0], ()))
    by_one, _ = told_by(serving, cases, TOKENS, 1)
    assert [one.tokens for one in by_one[:3]] == [answer] * 3
    told, _ = told_by(serving, cases, TOKENS, width)
    assert [one.tokens for one in told] == [one.tokens for one in by_one]
    right, long, wrong_in_places, _ = (one.counts for one in told)
    assert {*right[1 : TOKENS // width]} == {width}
    assert right[1 : TOKENS // width] == long[1 : TOKENS // width]
    assert 1.5 < np.mean(wrong_in_places[1 : TOKENS // width]) < width


def test_an_answer_that_was_interrupted_drafts_and_chooses_as_it_would_have(plain, serving):
    answer, sampling = plain[1].tokens, SAMPLINGS[1]
    predicted = [wrong(token) if n % 9 == 8 else token for n, token in enumerate(answer)]
    other = (PROMPT, SAMPLINGS[0], ())
    (whole, _), session = told_by(serving, [(PROMPT, sampling, predicted), other], TOKENS, 4)
    assert whole.tokens == answer
    for steps in (1, 3):
        kept = sum(whole.counts[: steps + 1])
        text = PROMPT + whole.tokens[: kept - 1]
        first = session.start(0, text, sampling, prompt_length=len(PROMPT), prediction=predicted)
        tokens, counts = [int(first.token_BW[0, 0])], []
        for _ in whole.counts[steps + 1 :]:
            result = session.step(4)
            counts.append(int(result.count_B[0]))
            tokens += np.asarray(result.token_BW)[0, : counts[-1]].tolist()
        assert counts == whole.counts[steps + 1 :]
        assert tokens[: TOKENS - kept + 1] == answer[kept - 1 :]


def test_a_width_that_there_is_not_is_told(drafting, without_drafts):
    session = Session(*drafting)
    session.start(0, PROMPT)
    with pytest.raises(ValueError, match=r"width=3 must be one of \(1, 4, 8\)"):
        session.step(3)
    plain = Session(*without_drafts)
    plain.start(0, PROMPT)
    with pytest.raises(ValueError, match=r"width=4 must be one of \(1,\)"):
        plain.step(4)
