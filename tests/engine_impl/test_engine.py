"""The engine's promises, on a model small enough to run hundreds of steps in a second."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.cache_manager import KV
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS, SamplingParams
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from .tiny_models import TINY, greedy, tiny_engine

PROMPT = [5, 17, 80, 3, 3, 99, 41]


@pytest.fixture(scope="module")
def tiny():
    return tiny_engine()


def start(engine, params, prompts, sampling=()):
    """Slots given by the prompts' keys."""
    state = engine.init_decode_state()
    for slot, prompt in prompts.items():
        chosen = dict(sampling).get(slot, SamplingParams())
        prefix, _ = engine.prefill(params, *engine.pad(prompt), sampling=chosen)
        state = engine.insert(prefix, state, slot)
    return state


def poisoned(state):
    """NaN in every row that no slot has filled."""
    row_S1 = jnp.arange(state.cache.rows.shape[3])[:, None]
    live = row_S1 < state.length_B[None, :, None, None, None]
    return replace(state, cache=KV(jnp.where(live, state.cache.rows, jnp.nan)))


def host(state):
    return jax.tree.map(np.array, state)


def test_steps_equal_one_prefill_of_the_same_tokens(tiny):
    """Decode and prefill are two programs for one function: same tokens, same cache, same successor."""
    engine, params = tiny
    (answer,) = greedy(engine, params, [PROMPT], 30)
    state = start(engine, params, {0: PROMPT})
    for _ in range(29):
        state, _ = engine.generate(params, state)
    text = PROMPT + answer[:-1]
    prefix, successor = engine.prefill(params, *engine.pad(text))
    assert int(state.length_B[0]) == len(text)
    np.testing.assert_allclose(
        state.cache.rows[:, 0, :, : len(text)], prefix.kv.rows[:, :, : len(text)], rtol=1e-4, atol=1e-5
    )
    assert int(successor.token_BW[0, 0]) == answer[-1]
    assert len(set(answer)) > 5  # a model that repeats itself would prove little


def test_the_step_writes_one_row_of_each_live_slot_and_reads_no_slack(tiny):
    """Everything beyond a slot's length is NaN before the step, and still is after it, but for the new row."""
    engine, params = tiny
    state = poisoned(start(engine, params, {0: PROMPT, 2: PROMPT[:1], 3: PROMPT * 9}))
    before = host(state)
    state, result = engine.generate(params, state)
    after = host(state)
    assert result.count_B.tolist() == [1, 0, 1, 1]
    expected = before.cache.rows.copy()
    for slot in (0, 2, 3):
        row = before.length_B[slot]
        written = after.cache.rows[:, slot, :, row]
        assert np.isfinite(written).all()
        expected[:, slot, :, row] = written
    np.testing.assert_array_equal(after.cache.rows, expected)
    assert list(after.length_B) == [8, 0, 2, 64]


def test_a_result_has_one_token_of_each_live_slot(tiny):
    """Alike for a step, a prefill and another first token: count says how many of the W tokens are valid."""
    engine, params = tiny
    prefix, first = engine.prefill(params, *engine.pad(PROMPT))
    _, again = engine.resample(prefix, SamplingParams(logprobs=2))
    state, step = engine.generate(params, engine.insert(prefix, engine.init_decode_state(), 2))
    for result, slots, count_B in ((first, 1, [1]), (again, 1, [1]), (step, 4, [0, 0, 1, 0])):
        assert result.count_B.tolist() == count_B
        assert (result.token_BW.shape, result.logprob_BW.shape) == ((slots, 1), (slots, 1))
        assert (result.top_token_BWP.shape, result.top_logprob_BWP.shape) == ((slots, 1, MAX_LOGPROBS),) * 2
        np.testing.assert_array_equal(np.asarray(result.token_BW) >= 0, np.array(count_B)[:, None] > 0)
    assert step.token_BW[2, 0] == state.token_B[2]


def test_insert_writes_its_slot_and_nothing_else(tiny):
    engine, params = tiny
    state = start(engine, params, {0: PROMPT, 1: PROMPT, 3: PROMPT})
    before = host(state)
    prefix, first = engine.prefill(params, *engine.pad(PROMPT[:3]))
    state = engine.insert(prefix, state, 1)
    after = host(state)
    others = [0, 2, 3]
    np.testing.assert_array_equal(after.cache.rows[:, others], before.cache.rows[:, others])
    np.testing.assert_array_equal(after.length_B[others], before.length_B[others])
    assert (after.length_B[1], after.token_B[1]) == (3, int(first.token_BW[0, 0]))


def test_a_full_slot_stops_and_nothing_is_written_past_its_end(tiny):
    """Row S does not exist: a slot that reaches it stays as it is, token -1, while its neighbours go on."""
    engine, params = tiny
    length = engine.cache_length
    prompt = [n % 101 for n in range(length)]
    state = start(engine, params, {0: prompt[: length - 1], 1: prompt, 2: PROMPT})
    state, result = engine.generate(params, state)
    assert result.count_B.tolist() == [1, 0, 1, 0]
    before = host(state)
    state, result = engine.generate(params, state)
    after = host(state)
    assert result.count_B.tolist() == [0, 0, 1, 0]
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
    """In another slot, with others beside that ask for other things, one of them joining late and one leaving."""
    engine, params = tiny

    def answer(slot, others):
        beside = SamplingParams(temperature=2, presence_penalty=-1)
        state = start(engine, params, {slot: PROMPT} | others, {slot: asked, (slot + 1) % 4: beside})
        tokens = []
        for step in range(20):
            if others and step == 5:
                prefix, _ = engine.prefill(params, *engine.pad(PROMPT * 4))
                state = engine.insert(prefix, state, (slot + 2) % 4)
            if others and step == 10:
                state = engine.free(state, (slot + 1) % 4)
            state, result = engine.generate(params, state)
            tokens.append(int(result.token_BW[slot, 0]))
        return tokens

    alone = answer(0, {})
    assert answer(3, {}) == alone
    assert answer(2, {3: PROMPT[2:], 1: [4]}) == alone
    assert len(set(alone)) > 5


def test_the_seed_decides_a_sampled_answer(tiny):
    engine, params = tiny

    def first_tokens(seed):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        state = start(engine, params, {0: PROMPT}, {0: sampling})
        tokens = [int(state.token_B[0])]
        for _ in range(8):
            state, result = engine.generate(params, state)
            tokens.append(int(result.token_BW[0, 0]))
        return tokens

    assert first_tokens(1) == first_tokens(1)
    assert first_tokens(1) != first_tokens(2)


def test_freed_slots_are_empty_and_greedy_again(tiny):
    """Whatever their request asked for: the next steps would pay for it."""
    engine, params = tiny
    everything = SamplingParams(
        temperature=1.5, top_k=3, top_p=0.5, min_p=0.1, seed=3,
        repetition_penalty=2, presence_penalty=1, frequency_penalty=1, logprobs=3,
        logit_bias={3: 5.0, 9: -5.0}, stop_token_ids=(3,),
    )  # fmt: skip
    state = start(engine, params, {1: PROMPT}, {1: everything})
    state = engine.free(state, 1)
    assert not np.asarray(state.length_B).any()
    jax.tree.map(np.testing.assert_array_equal, state.sampling, engine.init_decode_state().sampling)
    before = host(state)
    state, result = engine.generate(params, state)
    assert result.token_BW.tolist() == [[-1]] * 4
    assert result.count_B.tolist() == [0] * 4
    np.testing.assert_array_equal(np.asarray(state.cache.rows), before.cache.rows)


def test_everything_is_compiled_once():
    """However slots fill, prompts vary and parameters change: warm_up compiles all there is to compile."""
    engine, params = tiny_engine(slots=3)
    engine.get_tokenizer = lambda: NoTokenizer("tiny", vocab_size=101, bos_id=None, stop_ids=frozenset({3}))
    compilations = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        state = engine.warm_up(params, engine.init_decode_state())
        assert len(compilations) >= len(engine.buckets) * 2 + 3
        compilations.clear()
        for round_, length in enumerate([1, 16, 17, 128, 3, 60]):
            sampling = SamplingParams(
                temperature=round_ / 2, top_k=round_, top_p=1 - round_ / 10, min_p=round_ / 10, seed=round_,
                repetition_penalty=1 + round_ / 10, presence_penalty=round_ / 5, frequency_penalty=round_ / 6,
                logprobs=round_ or None, logit_bias=dict.fromkeys(range(round_), 1.5), min_tokens=round_,
            )  # fmt: skip
            prompt = engine.pad([1] * length)
            prefix, _ = engine.prefill(params, *prompt, sampling=sampling, prompt_logprobs=round_ > 2)
            if round_ % 2:
                prefix, _ = engine.resample(prefix, replace(sampling, seed=99))
            state = engine.insert(prefix, state, round_ % 3)
            state, result = engine.generate(params, state)
            np.asarray(result.token_BW)
            state = engine.free(state, (round_ + 1) % 3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compilations == []


def test_the_state_is_donated(tiny):
    """Or every step would need a second cache."""
    engine, params = tiny
    state = engine.init_decode_state()
    prefix, _ = engine.prefill(params, *engine.pad(PROMPT))
    inserted = engine.insert(prefix, state, 0)
    assert state.cache.rows.is_deleted()
    assert not prefix.kv.rows.is_deleted()  # one prefill may serve several slots
    engine.generate(params, inserted)
    assert inserted.cache.rows.is_deleted()


def test_penalties_hold_over_prompt_and_answer(tiny):
    """Greedy with all penalties, token by token: prefill's own logits of the text so far, penalised by hand."""
    engine, params = tiny
    sampling = SamplingParams(repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.3)
    prefix, first = engine.prefill(params, *engine.pad(PROMPT), sampling=sampling)
    state, answer = engine.insert(prefix, engine.init_decode_state(), 2), [int(first.token_BW[0, 0])]
    for _ in range(24):
        state, result = engine.generate(params, state)
        answer.append(int(result.token_BW[2, 0]))
    for position, token in enumerate(answer):
        said = answer[:position]
        logits_V = np.array(engine.prefill(params, *engine.pad(PROMPT + said))[0].logits_V)
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
    prefix, _ = engine.prefill(params, *engine.pad(PROMPT), sampling=asked)
    again, _ = engine.resample(prefix, asked)
    beside, _ = engine.prefill(params, *engine.pad(PROMPT))
    state = engine.init_decode_state()
    for slot, one in enumerate((prefix, again, beside)):
        state = engine.insert(one, state, slot)
    answers = [np.asarray(state.token_B)[:3]]
    for _ in range(9):
        state, _ = engine.generate(params, state)
        answers.append(np.asarray(state.token_B)[:3])
    first, second, unasked = np.array(answers).T.tolist()
    assert first == second
    assert unasked == free
    for position, token in enumerate(first):
        logits_V = np.array(engine.prefill(params, *engine.pad(PROMPT + first[:position]))[0].logits_V)
        if position < min_tokens:
            logits_V[held_back] = -np.inf
        assert logits_V.argmax() == token
    assert not set(held_back) & set(first[:min_tokens])
    assert (first == free) == (min_tokens == 0)


def test_several_answers_come_from_one_prefill(tiny):
    """A resampled prefix is that of a prefill with its parameters, and its answer too; the first stays as it was."""
    engine, params = tiny
    asked = [SamplingParams(), SamplingParams(temperature=1.2, repetition_penalty=1.5, logprobs=2, seed=4)]
    prefix, _ = engine.prefill(params, *engine.pad(PROMPT), sampling=asked[0])
    before = host(prefix)
    for sampling in asked:
        again, told = engine.resample(prefix, sampling)
        fresh, expected = engine.prefill(params, *engine.pad(PROMPT), sampling=sampling)
        jax.tree.map(np.testing.assert_array_equal, (again, told), (fresh, expected))
    jax.tree.map(np.testing.assert_array_equal, host(prefix), before)

    tokens = []
    for slot, prefix in enumerate((again, fresh)):
        state = engine.insert(prefix, engine.init_decode_state(), slot)
        for _ in range(8):
            state, result = engine.generate(params, state)
            tokens.append(int(result.token_BW[slot, 0]))
    assert tokens[:8] == tokens[8:]
    assert len({int(engine.resample(prefix, replace(asked[1], seed=seed))[1].token_BW[0, 0]) for seed in range(8)}) > 2


def test_a_step_tells_the_logprobs_that_a_slot_asks_for(tiny):
    """Under the model itself: the same for a slot that draws, penalises and cuts."""
    engine, params = tiny
    drawn = SamplingParams(temperature=3, min_p=0.01, frequency_penalty=2, logprobs=5, seed=2)
    prefix, first = engine.prefill(params, *engine.pad(PROMPT), sampling=drawn)
    state, text, results = engine.insert(prefix, engine.init_decode_state(), 1), list(PROMPT), [(first, 0)]
    for _ in range(6):
        state, result = engine.generate(params, state)
        results.append((result, 1))
    for result, slot in results:
        logits_V = engine.prefill(params, *engine.pad(text))[0].logits_V
        logprob_V = jax.nn.log_softmax(logits_V)
        token = int(result.token_BW[slot, 0])
        np.testing.assert_allclose(result.logprob_BW[slot, 0], logprob_V[token], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(result.top_token_BWP[slot, 0], np.argsort(-logprob_V)[:MAX_LOGPROBS])
        np.testing.assert_allclose(
            result.top_logprob_BWP[slot, 0], -np.sort(-logprob_V)[:MAX_LOGPROBS], rtol=1e-4, atol=1e-4
        )
        text.append(token)


def test_two_ways_to_score_a_text_agree(tiny):
    """Prefill's prompt logprobs, and the text fed to the decode step token by token, beside other slots, with NaN in
    every row that no token has filled; and the cache that the steps leave is the prefill's."""
    engine, params = tiny
    texts = {0: PROMPT * 3, 2: [9, *PROMPT], 3: PROMPT[::-1] * 5}
    steps = min(map(len, texts.values())) - 2
    whole = {slot: engine.prefill(params, *engine.pad(text), prompt_logprobs=True)[0] for slot, text in texts.items()}
    state, scores = engine.init_decode_state(), {slot: [] for slot in texts}
    for slot, text in texts.items():
        prefix, _ = engine.prefill(params, *engine.pad(text[:1]))
        prefix, logprob = engine.force(prefix, text[1])
        state = engine.insert(prefix, state, slot)
        scores[slot].append(float(logprob))
    state = poisoned(state)
    for step in range(2, 2 + steps):
        next_token_B = np.array([texts[slot][step] if slot in texts else 0 for slot in range(4)])
        state, logprob_B = engine.score_step(params, state, next_token_B)
        for slot in texts:
            scores[slot].append(float(logprob_B[slot]))
    assert state.length_B.tolist() == [steps + 1, 0, steps + 1, steps + 1]
    for slot, prefix in whole.items():
        expected_T = np.asarray(prefix.prompt_logprob_T)
        np.testing.assert_allclose(scores[slot], expected_T[1 : steps + 2], rtol=1e-4, atol=1e-4)
        assert expected_T[0] == 0
        assert not expected_T[len(texts[slot]) :].any()
        rows = np.s_[:, :, : steps + 1]
        np.testing.assert_allclose(state.cache.rows[:, slot][rows], prefix.kv.rows[rows], rtol=1e-4, atol=1e-5)


def test_nobody_asked_so_there_are_no_prompt_logprobs(tiny):
    engine, params = tiny
    assert not np.asarray(engine.prefill(params, *engine.pad(PROMPT))[0].prompt_logprob_T).any()


@pytest.mark.parametrize("length", [0, 129])
def test_pad_refuses_what_no_bucket_holds(tiny, length):
    engine, _ = tiny
    with pytest.raises(RefusedError, match=rf"prompt of {length} tokens .* from 1 to 128"):
        engine.pad([1] * length)


@pytest.mark.parametrize(("length", "bucket"), [(1, 16), (16, 16), (17, 32), (128, 128)])
def test_pad_takes_the_smallest_bucket(tiny, length, bucket):
    padded_T, true_length = tiny[0].pad(range(1, length + 1))
    assert (len(padded_T), true_length) == (bucket, length)
    assert list(padded_T[:length]) == list(range(1, length + 1))


@pytest.mark.parametrize(
    ("devices", "kv_heads"),
    [
        pytest.param(8, 8, id="split", marks=pytest.mark.slow),
        pytest.param(8, 4, id="replicated"),
        pytest.param(4, 4, id="split4", marks=pytest.mark.slow),
        pytest.param(2, 1, id="mqa", marks=pytest.mark.slow),
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
    state = engine.init_decode_state()
    prefix, _ = engine.prefill(params, *engine.pad(PROMPT))
    generate = engine.jitted.generate.lower(params, state, engine.page_BJ).compile().memory_analysis()
    insert = engine.jitted.insert.lower(prefix, state, np.int32(0), engine.page_BJ[0]).compile().memory_analysis()
    score = (
        engine.jitted.score_step.lower(params, state, engine.page_BJ, np.zeros(4, np.int32)).compile().memory_analysis()
    )
    for memory in (generate, insert, score):
        assert memory is not None
        assert memory.alias_size_in_bytes >= engine.layout.bytes + state.count_BV.nbytes
        assert memory.temp_size_in_bytes < engine.layout.bytes / 4
