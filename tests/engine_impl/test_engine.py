"""The engine's promises, on a model small enough to run hundreds of steps in a second."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest
from slipstream.cache_manager import KV
from slipstream.engine_impl.api import Opening, Piece
from slipstream.engine_impl.assembly import twin
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.mask import Mask
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS, SamplingParams
from slipstream.engine_impl.session import Session
from slipstream.engine_impl.shapes import Carried
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from .tiny_models import TINY, greedy, logits_behind, tiny_engine

PROMPT = [5, 17, 80, 3, 3, 99, 41]
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def tiny():
    return tiny_engine()


def start(engine, params, prompts, sampling=()):
    """Slots given by the prompts' keys."""
    session = Session(engine, params)
    for slot, prompt in prompts.items():
        session.start(slot, prompt, dict(sampling).get(slot, GREEDY))
    return session


def opening(text: Sequence[int], sampling: SamplingParams = GREEDY) -> Opening:
    return Opening(text=text, prompt_length=len(text), sampling=sampling)


def rows_of(session, slot, length):
    """A slot's first rows in the cache, [L, K, S, C]."""
    rows = np.asarray(session.state.cache.rows)[:, session.page_BJ[slot]]
    return rows.swapaxes(1, 2).reshape(rows.shape[0], rows.shape[2], -1, rows.shape[4])[:, :, :length]


def poisoned(session):
    """NaN in every row that no slot has filled."""
    state, R = session.state, session.engine.sizes.page_rows
    rows = np.array(state.cache.rows)
    live = np.zeros((rows.shape[1], R), bool)
    for slot in session.slots:
        for row in range(int(state.length_B[slot])):
            live[session.page_BJ[slot, row // R], row % R] = True
    rows[:, ~live[:, None, :].repeat(rows.shape[2], 1)] = np.nan
    session.state = replace(state, cache=KV(jax.device_put(rows, state.cache.rows.sharding)))


def host(state):
    return jax.tree.map(np.array, state)


def test_steps_equal_one_prefill_of_the_same_tokens(tiny):
    """Decode and prefill are two programs for one function: same tokens, same cache, same successor."""
    engine, params = tiny
    (answer,) = greedy(engine, params, [PROMPT], 30)
    session = start(engine, params, {0: PROMPT})
    for _ in range(29):
        session.step()
    text = PROMPT + answer[:-1]
    other = Session(engine, params)
    successor = other.start(0, text)
    assert int(session.state.length_B[0]) == len(text)
    np.testing.assert_allclose(rows_of(session, 0, len(text)), rows_of(other, 0, len(text)), rtol=1e-4, atol=1e-5)
    assert int(successor.token_BW[0, 0]) == answer[-1]
    assert len(set(answer)) > 5  # a model that repeats itself would prove little


def test_the_step_writes_one_row_of_each_live_slot_and_reads_no_slack(tiny):
    """Everything beyond a slot's length is NaN before the step, and still is after it, but for the new row."""
    engine, params = tiny
    session = start(engine, params, {0: PROMPT, 2: PROMPT[:1], 3: PROMPT * 9})
    poisoned(session)
    before = host(session.state)
    result = session.step()
    after = host(session.state)
    assert result.count_B.tolist() == [1, 1, 1, 0]
    expected = before.cache.rows.copy()
    for slot in (0, 2, 3):
        row = before.length_B[slot]
        written = after.cache.rows[:, slot, :, row]
        assert np.isfinite(written).all()
        expected[:, slot, :, row] = written
    np.testing.assert_array_equal(after.cache.rows, expected)
    assert list(after.length_B) == [8, 0, 2, 64]


def test_a_slot_that_is_not_named_takes_no_part(tiny):
    """Whatever it holds; and where none is named, nothing changes."""
    engine, params = tiny
    session = start(engine, params, {0: PROMPT, 1: PROMPT[2:], 3: PROMPT * 2})
    before = host(session.state)
    for slots in ([], [3], [1, 0]):
        page_NJ = session.page_BJ[slots]
        session.state, result = engine.generate(params, session.state, np.array(slots, np.int32), page_NJ)
        assert result.count_B.tolist()[: len(slots)] == [1] * len(slots)
        assert not np.asarray(result.count_B)[len(slots) :].any()
        after = host(session.state)
        others = [slot for slot in range(4) if slot not in slots]
        for leaf in ("token_B", "length_B"):
            np.testing.assert_array_equal(getattr(after, leaf)[others], getattr(before, leaf)[others])
        np.testing.assert_array_equal(after.cache.rows[:, others], before.cache.rows[:, others])
        assert all(after.token_B[slot] == token for slot, token in zip(slots, result.token_BW[:, 0], strict=False))
        before = after


def test_a_result_has_one_token_of_each_slot(tiny):
    """Alike for a step and for first tokens: count says how many of the W tokens are valid."""
    engine, params = tiny
    session = Session(engine, params)
    prefix, first = engine.first_tokens(session.prefilled(2, PROMPT), [opening(PROMPT)])
    _, again = engine.first_tokens(prefix, [opening(PROMPT, SamplingParams(logprobs=2))])
    _, nothing = engine.first_tokens(prefix, [None])
    session.insert(prefix, 2)
    step = session.step()
    session.start(0, PROMPT)
    both = session.step()
    told = ((first, [1]), (again, [1]), (nothing, [0]), (step, [1]), (both, [1, 1, 0, 0]))
    for result, count_B in told:
        rows = len(count_B)
        assert result.count_B.tolist() == count_B
        assert (result.token_BW.shape, result.logprob_BW.shape) == ((rows, 1), (rows, 1))
        assert (result.top_token_BWP.shape, result.top_logprob_BWP.shape) == ((rows, 1, MAX_LOGPROBS),) * 2
        np.testing.assert_array_equal(np.asarray(result.token_BW) >= 0, np.array(count_B)[:, None] > 0)
    assert both.token_BW[0, 0] == session.state.token_B[2]


def test_insert_writes_its_slot_and_nothing_else(tiny):
    engine, params = tiny
    session = start(engine, params, {0: PROMPT, 1: PROMPT, 3: PROMPT})
    before = host(session.state)
    first = session.start(1, PROMPT[:3])
    after = host(session.state)
    others = [0, 2, 3]
    np.testing.assert_array_equal(after.cache.rows[:, others], before.cache.rows[:, others])
    np.testing.assert_array_equal(after.length_B[others], before.length_B[others])
    assert (after.length_B[1], after.token_B[1]) == (3, int(first.token_BW[0, 0]))


def test_a_piece_whose_text_goes_on_leaves_the_slots_alone(tiny):
    engine, params = tiny
    session = start(engine, params, {0: PROMPT, 1: PROMPT})
    before = host(session.state)
    prefix, _ = engine.first_tokens(session.prefilled(2, PROMPT * 2), [opening(PROMPT)])
    session.insert(prefix, 2, is_last=False)
    after = host(session.state)
    jax.tree.map(np.testing.assert_array_equal, replace(after, cache=before.cache), before)
    assert (after.cache.rows[:, 2] != before.cache.rows[:, 2]).any()
    np.testing.assert_array_equal(after.cache.rows[:, [0, 1, 3]], before.cache.rows[:, [0, 1, 3]])


def test_a_full_slot_stops_and_nothing_is_written_past_its_end(tiny):
    """Row S does not exist: a slot that reaches it stays as it is, token -1, while its neighbours go on."""
    engine, params = tiny
    length = engine.sizes.cache_length
    prompt = [n % 101 for n in range(length)]
    session = start(engine, params, {0: prompt[: length - 1], 1: prompt, 2: PROMPT})
    assert session.step().count_B.tolist() == [1, 0, 1, 0]
    before = host(session.state)
    assert session.step().count_B.tolist() == [0, 0, 1, 0]
    after = host(session.state)
    assert list(after.length_B) == [length, length, len(PROMPT) + 2, 0]
    np.testing.assert_array_equal(after.cache.rows[:, :2], before.cache.rows[:, :2])


@pytest.mark.parametrize(
    "asked",
    [
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=7),
        SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={5: 3.0, 17: -100.0}),
        SamplingParams(temperature=0.8, min_p=0.05, presence_penalty=1.0, seed=7, logprobs=3),
    ],
    ids=["cut", "penalised", "all"],
)
def test_neither_slot_nor_batch_mates_change_a_request(tiny, asked):
    """Alone in a step of one slot, and in another slot of a step of all, with others beside that ask for other things,
    one of them joining late and one leaving."""
    engine, params = tiny

    def answer(slot, others):
        beside = SamplingParams(temperature=2, presence_penalty=-1)
        session = start(engine, params, others | {slot: PROMPT}, {slot: asked, (slot + 1) % 4: beside})
        tokens = []
        for step in range(20):
            if others and step == 5:
                session.start((slot + 2) % 4, PROMPT * 4)
            if others and step == 10:
                session.stop((slot + 1) % 4)
            result = session.step()
            tokens.append(int(result.token_BW[session.slots.index(slot), 0]))
        return tokens

    alone = answer(0, {})
    assert answer(3, {}) == alone
    assert answer(2, {3: PROMPT[2:], 1: [4]}) == alone
    assert len(set(alone)) > 5


def test_the_seed_decides_a_sampled_answer(tiny):
    engine, params = tiny

    def first_tokens(seed):
        session = Session(engine, params)
        first = session.start(0, PROMPT, SamplingParams(temperature=1.0, seed=seed))
        return [int(first.token_BW[0, 0]), *(int(session.step().token_BW[0, 0]) for _ in range(8))]

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)


@pytest.mark.parametrize(
    "asked",
    [
        GREEDY,
        SamplingParams(temperature=0.9, top_p=0.9, seed=5),
        SamplingParams(repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.3),
        SamplingParams(min_tokens=9, stop_token_ids=(88, 69, 60, 48), logit_bias={27: 2.0}),
    ],
    ids=["greedy", "drawn", "penalised", "held"],
)
def test_an_answer_that_was_interrupted_goes_on_as_it_would_have(tiny, monkeypatch, asked):
    """Its prompt and what it has of the answer are a text for another slot."""
    engine, params = tiny
    own = NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({3}))
    monkeypatch.setattr(engine, "get_tokenizer", lambda: own)
    session = Session(engine, params)
    whole = [int(session.start(1, PROMPT, asked).token_BW[0, 0])]
    whole += [int(session.step().token_BW[0, 0]) for _ in range(19)]
    assert len({*whole}) > 5
    for kept in (1, 7):
        again = Session(engine, params)
        text = PROMPT + whole[:kept]
        answer = [int(again.start(3, text, asked, prompt_length=len(PROMPT)).token_BW[0, 0])]
        answer += [int(again.step().token_BW[0, 0]) for _ in range(19 - kept)]
        assert whole[:kept] + answer == whole


def test_a_twin_has_its_own_shapes_and_leaves_the_engine_as_it_was(tiny):
    engine, _ = tiny
    other = twin(engine, layer_loop="scan", shapes=replace(engine.shapes, chunk=64, platform="tpu"))
    assert other.sizes == replace(engine.sizes, prefill_chunk=64, prefill_batch=(2, 4, 64), prefill_lengths=(16, 64))
    assert (engine.sizes.prefill_chunk, engine.sizes.prefill_batch) == (128, (4, 4, 32))
    assert (other.parameters.layer_loop, engine.parameters.layer_loop) == ("scan", "unrolled")
    assert other.programs is engine.programs


@pytest.mark.slow
def test_everything_is_compiled_once():
    """However slots fill, prompts vary and parameters change: warm_up compiles all there is to compile."""
    engine, params = tiny_engine(slots=4, cache_length=256, prefill_chunk=128, speculate="auto")
    engine = twin(engine, shapes=replace(engine.shapes, carried=Carried(4, 64, 64)))
    engine.get_tokenizer = lambda: NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({3}))
    compilations = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        session = Session(engine, params)
        compilations.clear()
        session.state = engine.warm_up(params, session.state)
        assert engine.shapes.prefills == ((1, 16), (1, 64), (1, 128), (4, 32))
        assert (engine.shapes.steps, engine.shapes.carries) == ((1, 4), ((4, 64),))
        assert engine.shapes.wide_steps == ((4, 2), (1, 4), (4, 4), (1, 8))
        programs = 4 + 4 + 2 + 2 + 4 + 1
        assert len(compilations) == programs, "prefill and insert; first tokens of 1 and of 4; steps; wide ones; carry"
        compilations.clear()
        for round_, length in enumerate([1, 16, 17, 128, 3, 129, 250]):
            sampling = SamplingParams(
                temperature=round_ / 2, top_k=round_, top_p=1 - round_ / 10, min_p=round_ / 10, seed=round_,
                repetition_penalty=1 + round_ / 10, presence_penalty=round_ / 5, frequency_penalty=round_ / 6,
                logprobs=round_ or None, logit_bias=dict.fromkeys(range(round_), 1.5), min_tokens=round_,
            )  # fmt: skip
            slot = round_ % 3
            for prefix in session.prefill(slot, [1] * length, next_id=7 if round_ > 2 else None):
                prefix, _ = engine.first_tokens(prefix, [opening([1] * length, sampling)])
            if round_ % 2:
                prefix, _ = engine.first_tokens(prefix, [opening([1] * length, replace(sampling, seed=99))])
            session.insert(prefix, slot)
            np.asarray(session.step((1, 2, 4, 8)[round_ % 4]).token_BW)
            if round_ > 3:
                session.stop(slot)
        pieces = [Piece(token_T=np.arange(n + 1), start=0, page_J=session.page_BJ[n]) for n in range(2)]
        prefix = engine.prefill(params, session.state, pieces)
        prefix, _ = engine.first_tokens(prefix, [opening([0, 1], sampling), None])
        session.state = engine.insert(prefix, session.state, [1, None], session.page_BJ[:2])
        np.asarray(session.step().token_BW)
        for length in (1, 64):
            piece = Piece(token_T=np.zeros(length, np.int32), start=0, page_J=session.page_BJ[3])
            texts = np.array([1, 0], np.int32), session.page_BJ[[1, 0]]
            session.state, result, prefix = engine.carry(params, session.state, *texts, [piece])
            prefix, _ = engine.first_tokens(prefix, [opening([0] * length, sampling)])
            session.insert(prefix, 3)
            np.asarray(result.token_BW)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []


def test_the_state_is_donated_but_not_to_a_prefill(tiny):
    """Or every step would need a second cache."""
    engine, params = tiny
    session = Session(engine, params)
    state = session.state
    prefix = session.prefilled(0, PROMPT)
    assert not state.cache.rows.is_deleted()
    session.insert(prefix, 0)
    assert state.cache.rows.is_deleted()
    assert not prefix.kv.rows.is_deleted()  # one prefill may serve several slots
    inserted = session.state
    session.step()
    assert inserted.cache.rows.is_deleted()


def test_penalties_hold_over_prompt_and_answer(tiny):
    """Greedy with all penalties, token by token: prefill's own logits of the text so far, penalised by hand."""
    engine, params = tiny
    sampling = SamplingParams(repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.3)
    session = Session(engine, params)
    answer = [int(session.start(2, PROMPT, sampling).token_BW[0, 0])]
    answer += [int(session.step().token_BW[0, 0]) for _ in range(24)]
    for position, token in enumerate(answer):
        said = answer[:position]
        logits_V = logits_behind(engine, params, PROMPT + said)
        seen = list({*PROMPT, *said})
        logits_V[seen] = np.where(logits_V[seen] > 0, logits_V[seen] / 1.4, logits_V[seen] * 1.4)
        count_V = np.bincount(said, minlength=len(logits_V))
        assert (logits_V - 0.7 * (count_V > 0) - 0.3 * count_V).argmax() == token
    assert answer != greedy(engine, params, [PROMPT], 25)[0]


@pytest.mark.parametrize(("min_tokens", "ignores"), [(0, False), (1, False), (3, False), (8, False), (8, True)])
def test_no_answer_ends_before_its_least_length(tiny, monkeypatch, min_tokens, ignores):
    """The model would end at once, or at its third token: prefill's own logits of the text so far, by hand. A prompt's
    length, a second sample and a slot beside that waits for nothing change nothing."""
    engine, params = tiny
    free = greedy(engine, params, [PROMPT], 10)[0]
    ends = {free[0], free[2]}
    own = NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({free[2]}))
    monkeypatch.setattr(engine, "get_tokenizer", lambda: own)
    asked = SamplingParams(min_tokens=min_tokens, stop_token_ids=(free[0],), ignore_eos=ignores)
    held_back = list(ends - ({free[2]} if ignores else set()))
    session = Session(engine, params)
    prefix, _ = engine.first_tokens(session.prefilled(0, PROMPT), [opening(PROMPT, asked)])
    again, _ = engine.first_tokens(prefix, [opening(PROMPT, asked)])
    beside, _ = engine.first_tokens(prefix, [opening(PROMPT)])
    for slot, one in enumerate((prefix, again, beside)):
        session.insert(one, slot)
    answers = [np.asarray(session.state.token_B)[:3]]
    for _ in range(9):
        session.step()
        answers.append(np.asarray(session.state.token_B)[:3])
    first, second, unasked = np.array(answers).T.tolist()
    assert first == second
    assert unasked == free
    for position, token in enumerate(first):
        logits_V = logits_behind(engine, params, PROMPT + first[:position])
        if position < min_tokens:
            logits_V[held_back] = -np.inf
        assert logits_V.argmax() == token
    assert not set(held_back) & set(first[:min_tokens])
    assert (first == free) == (min_tokens == 0)


def test_several_answers_come_from_one_prefill(tiny):
    """Another sample is what a prefill of its own would give, and its answer too; the first stays as it was."""
    engine, params = tiny
    asked = [GREEDY, SamplingParams(temperature=1.2, repetition_penalty=1.5, logprobs=2, seed=4)]
    session = Session(engine, params)
    prefix, _ = engine.first_tokens(session.prefilled(0, PROMPT), [opening(PROMPT)])
    before = host(prefix)
    for sampling in asked:
        again, told = engine.first_tokens(prefix, [opening(PROMPT, sampling)])
        fresh, expected = engine.first_tokens(session.prefilled(1, PROMPT), [opening(PROMPT, sampling)])
        jax.tree.map(np.testing.assert_array_equal, (again, told), (fresh, expected))
    jax.tree.map(np.testing.assert_array_equal, host(prefix), before)

    tokens = []
    for slot, one in enumerate((again, fresh)):
        other = Session(engine, params)
        other.insert(one, slot)
        tokens.append([int(other.step().token_BW[0, 0]) for _ in range(8)])
    assert tokens[0] == tokens[1]
    samples = [engine.first_tokens(prefix, [opening(PROMPT, replace(asked[1], seed=n))])[1] for n in range(8)]
    assert len({int(sample.token_BW[0, 0]) for sample in samples}) > 2


def test_a_step_tells_the_logprobs_that_a_slot_asks_for(tiny):
    """Under the model itself: the same for a slot that draws, penalises and cuts."""
    engine, params = tiny
    drawn = SamplingParams(temperature=3, min_p=0.01, frequency_penalty=2, logprobs=5, seed=2)
    session, text = Session(engine, params), list(PROMPT)
    results = [session.start(1, PROMPT, drawn), *(session.step() for _ in range(6))]
    for result in results:
        logprob_V = jax.nn.log_softmax(logits_behind(engine, params, text))
        token = int(result.token_BW[0, 0])
        np.testing.assert_allclose(result.logprob_BW[0, 0], logprob_V[token], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(result.top_token_BWP[0, 0], np.argsort(-logprob_V)[:MAX_LOGPROBS])
        np.testing.assert_allclose(
            result.top_logprob_BWP[0, 0], -np.sort(-logprob_V)[:MAX_LOGPROBS], rtol=1e-4, atol=1e-4
        )
        text.append(token)


def prompt_logprobs(session, text, next_id):
    """Of all its tokens but the first, and of `next_id`."""
    pieces = [np.asarray(prefix.logprob_NT)[0] for prefix in session.prefill(0, text, next_id)]
    return np.concatenate(pieces)


def test_two_ways_to_score_a_text_agree(tiny):
    """Prefill's prompt logprobs, and the text fed to the decode step token by token, beside other slots, with NaN in
    every row that no token has filled; and the cache that the steps leave is the prefill's."""
    engine, params = tiny
    texts = {0: PROMPT * 3, 2: [9, *PROMPT], 3: PROMPT[::-1] * 5}
    steps = min(map(len, texts.values())) - 2
    session, scores = Session(engine, params), {}
    for slot, text in texts.items():
        (prefix,) = session.prefill(slot, text[:1], next_id=text[1])
        scores[slot] = [float(prefix.logprob_NT[0, 0])]
        session.insert(engine.force(prefix, text[1:2]), slot)
    poisoned(session)
    for step in range(2, 2 + steps):
        logprob_N = session.score([texts[slot][step] for slot in session.slots])
        for n, slot in enumerate(session.slots):
            scores[slot].append(float(logprob_N[n]))
    assert session.state.length_B.tolist() == [steps + 1, 0, steps + 1, steps + 1]
    for slot, text in texts.items():
        whole = Session(engine, params)
        expected_T = prompt_logprobs(whole, text, -1)
        whole.start(slot, text)
        np.testing.assert_allclose(scores[slot], expected_T[: steps + 1], rtol=1e-4, atol=1e-4)
        assert not expected_T[len(text) - 1 :].any()
        rows = rows_of(session, slot, steps + 1), rows_of(whole, slot, steps + 1)
        np.testing.assert_allclose(*rows, rtol=1e-4, atol=1e-5)


def test_the_token_behind_a_text_is_told_of_where_it_is_known(tiny):
    session = Session(*tiny)
    known, unknown = (prompt_logprobs(session, PROMPT, next_id) for next_id in (11, -1))
    np.testing.assert_array_equal(known[: len(PROMPT) - 1], unknown[: len(PROMPT) - 1])
    engine, params = tiny
    expected = jax.nn.log_softmax(logits_behind(engine, params, PROMPT))[11]
    np.testing.assert_allclose(known[len(PROMPT) - 1], expected, rtol=1e-5)
    assert unknown[len(PROMPT) - 1] == 0


def test_the_likeliest_tokens_in_a_prompt_tokens_place(tiny):
    engine, params = tiny
    piece = Piece(token_T=np.array(PROMPT, np.int32), start=0, page_J=np.zeros(0, np.int32), next_id=11, logprobs=3)
    prefix = engine.prefill(params, engine.init_decode_state(), [piece])
    for at in (0, len(PROMPT) - 1):
        logprob_V = jax.nn.log_softmax(logits_behind(engine, params, PROMPT[: at + 1]))
        np.testing.assert_array_equal(prefix.top_token_NTP[0, at], np.argsort(-logprob_V)[:MAX_LOGPROBS])
        expected = -np.sort(-logprob_V)[:MAX_LOGPROBS]
        np.testing.assert_allclose(prefix.top_logprob_NTP[0, at], expected, rtol=1e-4, atol=1e-4)


def test_nobody_asked_so_there_are_no_prompt_logprobs(tiny):
    prefix = Session(*tiny).prefilled(0, PROMPT)
    for told in (prefix.logprob_NT, prefix.top_token_NTP, prefix.top_logprob_NTP):
        assert not np.asarray(told).any()


@pytest.mark.parametrize("length", [0, 129])
def test_a_session_refuses_what_no_slot_holds(tiny, length):
    with pytest.raises(RefusedError, match=rf"prompt of {length} tokens .* from 1 to 128"):
        Session(*tiny).start(0, [1] * length)


def test_a_session_refuses_a_slot_that_the_pool_has_no_pages_for():
    engine, params = tiny_engine(cache_tokens=256)
    session = Session(engine, params)
    with pytest.raises(RefusedError, match="slot=2: the cache has pages for 2 slots; raise --cache-tokens"):
        session.start(2, PROMPT)
    assert session.start(1, PROMPT).count_B.tolist() == [1]


def test_a_session_refuses_a_pool_that_holds_not_even_one_longest_request():
    session = Session(*tiny_engine(cache_length=256, cache_tokens=128))
    with pytest.raises(RefusedError, match=r"slot=0: .* for 0 slots; raise --cache-tokens to 256, or lower --"):
        session.start(0, PROMPT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "kv_heads"),
    [
        pytest.param(8, 8, id="split"),
        pytest.param(8, 4, id="replicated"),
        pytest.param(4, 4, id="split4", marks=pytest.mark.product),  # as `split` is, on fewer
        pytest.param(2, 1, id="mqa"),
    ],
)
def test_devices_change_no_token(devices, kv_heads):
    """Eight virtual devices give the tokens of one, whether kv heads are split over them or shared by several."""
    config = replace(TINY, num_kv_heads=kv_heads)
    prompts = [PROMPT, PROMPT[::-1] * 3, [1], PROMPT * 5]
    one = greedy(*tiny_engine(config), prompts, 40)
    engine, params = tiny_engine(config, devices=devices)
    assert greedy(engine, params, prompts, 40) == one
    shard = engine.init_decode_state().cache.rows.addressable_shards[0].data
    assert shard.shape[2] == max(kv_heads // devices, 1)
    layer = params["layers"][0]
    assert layer["self_attn.q_proj.weight"].addressable_shards[0].data.shape == (128 // devices, 32)
    assert layer["mlp.down_proj.weight"].addressable_shards[0].data.shape == (32, 48 // devices)


def test_no_step_nor_insert_copies_the_cache():
    """With no order between the last layer's read and the flush, XLA:CPU would save the cache first."""
    engine, params = tiny_engine(cache_length=512)
    session = Session(engine, params)
    prefix, texts = session.prefilled(0, PROMPT), (np.arange(4, dtype=np.int32), session.page_BJ)
    jitted, state = engine.jitted, session.state
    lowered = [
        jitted.generate.lower(params, state, *texts, Mask.nothing(4, engine.sizes.vocab_size)),
        jitted.generate.lower(params, state, texts[0][:1], texts[1][:1], Mask.nothing(1, engine.sizes.vocab_size)),
        jitted.insert.lower(prefix, state, texts[0][:1], texts[1][:1]),
        jitted.score_step.lower(params, state, *texts, texts[0]),
    ]
    piece = Piece(token_T=np.zeros(16), start=0, page_J=texts[1][0])
    batch = engine.shapes.pieces([piece])
    lowered.append(jitted.carry.lower(params, state, *texts, batch, Mask.nothing(4, engine.sizes.vocab_size)))
    for each in lowered:
        memory = each.compile().memory_analysis()
        assert memory is not None
        assert memory.alias_size_in_bytes >= engine.layout.bytes + state.count_BV.nbytes
        assert memory.temp_size_in_bytes < engine.layout.bytes / 4
    memory = jitted.prefill.lower(params, state.cache, batch).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < engine.layout.bytes / 4
