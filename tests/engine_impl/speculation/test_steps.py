"""Steps of several tokens: no answer changes by them, whatever is drafted, and nothing of a rejected draft is kept."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from slipstream.engine_impl.api import Allowed
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from ..tiny_models import tiny_engine
from .steps import scripted, told_by

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


def openings(predictions=((),) * 4):
    return [(PROMPT, sampling, prediction) for sampling, prediction in zip(SAMPLINGS, predictions, strict=True)]


@pytest.fixture(scope="module")
def plain():
    """Told of each sampling without speculation."""
    engine, params = tiny_engine()
    told, _ = told_by(with_tokenizer(engine), params, openings(), TOKENS, 1)
    assert all(len({*one.tokens}) > 8 for one in told), "a model that repeats itself would prove little"
    return told


@pytest.fixture(scope="module")
def drafting():
    engine, params = tiny_engine(speculate="auto")
    return with_tokenizer(scripted(len(PROMPT))(engine)), params


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_draft_changes_what_is_told(plain, drafting, script):
    """Tokens, log-probabilities and the likeliest tokens of four slots, each with its own sampling; and rows of rejected
    drafts are nowhere stored."""
    told, _ = told_by(*drafting, openings([SCRIPTS[script](one.tokens) for one in plain]), TOKENS, 4, checks_rows=True)
    for ours, theirs in zip(told, plain, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.tops == theirs.tops
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-3, atol=1e-4)
    steps = {len(one.counts) for one in told}
    if script == "right":
        assert {*told[0].counts[1:]} == {4}
    if script in ("wrong", "none"):
        assert steps == {TOKENS}


def test_the_widest_step_changes_nothing_either(plain, drafting):
    answers = [SCRIPTS["right"](one.tokens) for one in plain]
    told, _ = told_by(*drafting, openings(answers), TOKENS, 8)
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    assert {*told[0].counts[1:]} == {8}


def test_widths_may_change_from_step_to_step(plain, drafting):
    answers = [SCRIPTS["wrong at 3"](one.tokens) for one in plain]
    widths = iter([1, 4, 8, 1, 1, 8, 4] * 9)
    told, _ = told_by(*drafting, openings(answers), TOKENS, 1, step=lambda session, _: session.step(next(widths)))
    assert [one.tokens for one in told] == [one.tokens for one in plain]


def test_a_result_tells_how_many_drafts_there_were_and_how_many_were_right(plain, drafting):
    answer = plain[0].tokens
    session = Session(*drafting)
    session.start(0, PROMPT, prediction=[*answer[:6], wrong(answer[6]), *answer[7:12]])
    told = []
    for width in (1, 4, 4, 8, 1):
        result = session.step(width)
        told.append([int(counts[0]) for counts in (result.drafted_B, result.agreed_B, result.count_B)])
    # One draft would have been right; four were, of which three took part; the next is the wrong one, at width 4 and 8;
    # behind it all that are left, six of eight; none.
    assert told == [[1, 1, 1], [4, 4, 4], [4, 0, 1], [5, 5, 6], [0, 0, 1]]
    assert result.drafted_B.tolist()[1:] == [0, 0, 0]


@pytest.mark.parametrize("room", [1, 2, 3, 4, 5])
def test_a_full_cache_ends_the_accepted_run(drafting, room):
    """Exactly there: its last token is told, nothing is stored behind, and the slot beside goes on."""
    engine, params = drafting
    length = engine.cache_length
    prompt = (PROMPT * 9)[: length - room]
    plain = Session(engine, params)
    expected = [int(plain.start(0, prompt).token_BW[0, 0])]
    expected += [int(plain.step().token_BW[0, 0]) for _ in range(room)]
    assert plain.step().count_B.tolist()[0] == 0
    twin = scripted(len(prompt))(engine)
    session = Session(twin, params)
    session.start(1, PROMPT)
    session.start(0, prompt)
    texts = session.state.texts  # no prediction has room there: the drafts are put in its place
    ahead = [0] * (length - len(expected[1:])) + expected[1:]
    token_BS = np.array(texts.token_BS)
    token_BS[0] = ahead
    predicted_B = np.array(texts.predicted_B)
    predicted_B[0] = length - len(expected[1:]) - 3
    session.state = replace(
        session.state,
        texts=jax.device_put(replace(texts, token_BS=token_BS, predicted_B=predicted_B), texts.token_BS.sharding),
    )
    told = []
    while (count := int((result := session.step(4)).count_B[1])) > 0:
        assert int(result.count_B[0]) >= 1
        told += np.asarray(result.token_BW)[1, :count].tolist()
    assert told == expected[1:]
    assert session.state.length_B.tolist()[:2] == [length, len(PROMPT) + 2 + len(told) // 4]


def test_a_row_with_a_mask_gets_one_token_and_the_others_theirs(plain, drafting):
    """Whatever is drafted for it: which token may come behind a draft is not known."""
    answers = [one.tokens for one in plain]
    allowed_V = np.ones(101, bool)
    allowed_V[answers[0][1]] = False
    word_W = np.packbits(np.pad(allowed_V, (0, 27)), bitorder="little").view(np.uint32)
    tokens = {}
    for width in (1, 4):
        session = Session(*drafting)
        for slot in (0, 1):
            session.start(slot, PROMPT, SAMPLINGS[slot], prediction=answers[slot])
        slot_N = np.array([0, 1], np.int32)
        allowed = Allowed(row_C=np.array([0], np.int32), word_CW=word_W[None])
        session.state, result = session.engine.generate(
            session.params, session.state, slot_N, session.page_BJ[slot_N], allowed, width
        )
        assert result.count_B.tolist()[:2] == [1, width]
        assert result.drafted_B.tolist()[:2] == [0, width]
        tokens[width] = result.token_BW[0, 0]
        assert np.asarray(result.token_BW)[1, :width].tolist() == answers[1][1 : 1 + width]
    assert tokens[1] == tokens[4] != answers[0][1]


def test_what_the_text_repeats_is_drafted():
    """The proposer that serves: a prompt that has the answer in it, and one with a prediction."""
    engine, params = tiny_engine(speculate="auto", cache_length=256)
    (plain, *_), _ = told_by(engine, params, [(PROMPT, SamplingParams(), ())], TOKENS, 1)
    for width in (4, 8):
        (told,), _ = told_by(engine, params, [(PROMPT, SamplingParams(), plain.tokens)], TOKENS, width)
        assert told.tokens == plain.tokens
        assert max(told.counts) == width
        assert len(told.counts) < TOKENS / 2
    (told,), _ = told_by(engine, params, [(PROMPT, SamplingParams(), plain.tokens * 9)], TOKENS, 4)
    assert told.tokens == plain.tokens
    copied = PROMPT + plain.tokens + PROMPT
    (by_one, by_four), _ = (
        (told_by(engine, params, [(copied, SamplingParams(), ())], TOKENS, width)[0][0] for width in (1, 4)),
        None,
    )
    assert by_one.tokens == by_four.tokens


def test_an_answer_that_was_interrupted_drafts_and_chooses_as_it_would_have(drafting):
    engine, params = tiny_engine(speculate="auto")
    sampling = SamplingParams(temperature=0.9, seed=5)
    session = Session(engine, params)
    (plain,), _ = told_by(engine, params, [(PROMPT, sampling, ())], TOKENS, 1)
    predicted = [wrong(token) if n % 9 == 8 else token for n, token in enumerate(plain.tokens)]
    (whole,), _ = told_by(engine, params, [(PROMPT, sampling, predicted)], TOKENS, 4)
    assert whole.tokens == plain.tokens
    for steps in (1, 3):
        kept = sum(whole.counts[: steps + 1])
        text = PROMPT + whole.tokens[:kept]
        first = session.start(2, text[:-1], sampling, prompt_length=len(PROMPT), prediction=predicted)
        tokens, counts = [int(first.token_BW[0, 0])], []
        for _ in whole.counts[steps + 1 :]:
            result = session.step(4)
            counts.append(int(result.count_B[0]))
            tokens += np.asarray(result.token_BW)[0, : counts[-1]].tolist()
        assert tokens[: TOKENS - kept] == whole.tokens[kept - 1 :][: TOKENS - kept]
        assert counts == whole.counts[steps + 1 :]


def test_a_width_that_there_is_not_is_told(drafting):
    session = Session(*drafting)
    session.start(0, PROMPT)
    with pytest.raises(ValueError, match=r"width=3 must be one of \(1, 4, 8\)"):
        session.step(3)
    plain = Session(*tiny_engine())
    plain.start(0, PROMPT)
    with pytest.raises(ValueError, match=r"width=4 must be one of \(1,\)"):
        plain.step(4)
