"""Our engine under JetStream's own hands: its padding, its result processing, its transfer between engines."""

import jax
import numpy as np
import pytest
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.jetstream.engine import JetStreamEngine, create_engine, engine_api, token_utils
from slipstream.engine_impl.jetstream.tokenizer import NO_BOS, NO_TOKEN, JetStreamTokenizer
from slipstream.engine_impl.sizes import with_pages_for_all
from slipstream.engine_impl.text.tokenizer import NoTokenizer

from ..text_models import BOS, CONFIG, END, byte_tokenizer, one_device_engine, text_engine
from ..tiny_models import greedy, tiny_engine

PROMPTS = [[72, 105], list(b"Say so again."), [200, 3, 17]]
STEPS = 9


@pytest.fixture(scope="module")
def native():
    return one_device_engine()


@pytest.fixture(scope="module")
def expected(native):
    """The same prompts through our engine's own verbs."""
    own, params = native
    return greedy(own, params, PROMPTS, STEPS)


@pytest.fixture(scope="module")
def engine(native):
    return JetStreamEngine(*native)


def prefill(engine, prompt, existing_prefix=None, **options):
    """As JetStream's prefill thread does it: text or token ids."""
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    options = {"is_bos": True, "max_prefill_length": engine.max_prefill_length, "jax_padding": False} | options
    if isinstance(prompt, str):
        padded, length = tokenizer.encode(prompt, **options)
    else:
        padded, length = token_utils.pad_tokens(prompt, tokenizer.bos_id, tokenizer.pad_id, **options)
    return engine.prefill(
        params=engine.load_params(), existing_prefix=existing_prefix, padded_tokens=padded, true_length=length
    )


def length_of(prefix):
    return int(np.asarray(prefix.text.count_N)[0])


def decode(engine, prefixes, max_tokens, calls):
    """As its generate and detokenize threads do: answers by slot, each until JetStream calls it complete."""
    state, tokenizer = engine.init_decode_state(), engine.build_tokenizer(engine.get_tokenizer())
    for slot, prefix in enumerate(prefixes):
        state = engine.insert(prefix, state, slot=slot)
    answers = [[] for _ in prefixes]
    complete = [np.zeros(1, bool) for _ in prefixes]
    for _ in range(calls):
        state, result = engine.generate(engine.load_params(), state)
        result.copy_to_host_async()
        result = result.convert_to_numpy()
        for slot, answer in enumerate(answers):
            if not complete[slot].all():
                (sample,), complete[slot] = token_utils.process_result_tokens(
                    tokenizer=tokenizer,
                    slot=slot,
                    slot_max_length=max_tokens,
                    result_tokens=result,
                    complete=complete[slot],
                )
                answer += sample.token_ids
    return answers, [bool(done.all()) for done in complete], state


def test_nothing_is_abstract_and_nothing_is_inherited():
    assert issubclass(JetStreamEngine, engine_api.Engine)
    names = engine_api.Engine.__abstractmethods__ | {"build_tokenizer"}
    assert not [name for name in names if getattr(JetStreamEngine, name) is getattr(engine_api.Engine, name)]
    assert not JetStreamEngine.__abstractmethods__


def test_what_it_says_of_itself(engine):
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (3, 1, 128)
    assert engine.mesh.size == 1
    assert engine.colocated_cpus == jax.devices("cpu")
    assert engine.get_tokenizer().path == "tiny"


def test_every_token_comes_once_and_the_first_one_first(engine, expected):
    """Three slots at once, then JetStream's own stop at max_tokens."""
    answers, complete, _ = decode(engine, [prefill(engine, prompt) for prompt in PROMPTS], STEPS, STEPS)
    assert answers == expected
    assert complete == [False] * 3
    answers, complete, _ = decode(engine, [prefill(engine, prompt) for prompt in PROMPTS], STEPS, STEPS + 1)
    assert answers == expected
    assert complete == [True] * 3


def test_a_stop_token_ends_the_answer_and_empties_the_slot(native, expected, monkeypatch):
    stop_id = expected[1][3]
    monkeypatch.setattr(native[0], "get_tokenizer", lambda: byte_tokenizer(stop_ids=frozenset({stop_id})))
    stopping = JetStreamEngine(*native)
    answers, complete, state = decode(stopping, [prefill(stopping, prompt) for prompt in PROMPTS], 99, STEPS)
    assert answers == [answer[: answer.index(stop_id)] if stop_id in answer else answer for answer in expected]
    assert answers[1] == expected[1][:3]
    assert complete == [stop_id in answer for answer in expected]
    assert state.decode.length_B[1] == 0
    assert state.next_BW[1] == -1


def test_slots_that_nobody_waits_for_are_emptied(native, expected):
    watched = JetStreamEngine(*native)
    watched.idle_slots = lambda: [0]
    answers, _, state = decode(watched, [prefill(watched, prompt) for prompt in PROMPTS], 99, STEPS)
    assert answers == [expected[0][:1], *expected[1:]]  # the token that was there already is still handed out
    assert state.decode.length_B.tolist() == [0, *(len(prompt) + STEPS for prompt in PROMPTS[1:])]


def test_a_slot_whose_answer_goes_on_is_taken_over(engine, expected):
    """JetStream inserts into finished slots without freeing them."""
    _, _, state = decode(engine, [prefill(engine, PROMPTS[1])], 4, 5)
    state = engine.insert(prefill(engine, PROMPTS[0]), state, slot=0)
    tokens = []
    for _ in range(STEPS):
        state, result = engine.generate(engine.load_params(), state)
        (token, valid, length) = np.asarray(result.data)[0]
        tokens.append(int(token))
        assert (valid, length) == (1, len(tokens))
    assert tokens == expected[0]


def test_a_full_cache_ends_the_answer(engine):
    """125 tokens of prompt in 128 rows: the first token, and one for each row that is left."""
    answers, complete, _ = decode(engine, [prefill(engine, [65] * 125)], 99, 6)
    assert len(answers[0]) == 1 + 128 - 125
    assert complete == [True]


def test_a_model_without_bos_gets_none_whatever_the_driver_adds(engine):
    """Nor does it lose a first token that happens to be its BOS: a chat's first token often is."""
    assert engine.build_tokenizer(engine.get_tokenizer()).bos_id == NO_BOS
    for prompt in (PROMPTS[0], [BOS, *PROMPTS[0]], "Hi"):
        for is_bos in (True, False):
            assert length_of(prefill(engine, prompt, is_bos=is_bos)) == len(prompt)


def test_a_model_with_bos_gets_one(native):
    with_bos = JetStreamEngine(native[0], native[1])
    with_bos._tokenizer = JetStreamTokenizer(byte_tokenizer(adds_bos=True))
    for prompt in ([72, 105], [BOS, 72, 105], "Hi"):
        assert length_of(prefill(with_bos, prompt)) == 3
    assert length_of(prefill(with_bos, "Hi", is_bos=False)) == 2


@pytest.mark.parametrize("length", [127, 128, 129, 200])
def test_of_a_prompt_that_is_too_long_the_end_is_kept(engine, length):
    """As JetStream cuts it: 128 tokens are the largest bucket, its BOS included or not."""
    prompt = [*range(200)][:length]
    tail = prompt[-128:]
    kept, whole = prefill(engine, prompt), prefill(engine, tail, is_bos=False)
    assert length_of(kept) == len(tail)
    jax.tree.map(np.testing.assert_array_equal, kept, whole)


@pytest.mark.parametrize("prompt", [[], "", [72, 260], [72, -5]])
def test_a_prompt_that_cannot_be_answered_gets_an_empty_answer(engine, expected, prompt, caplog):
    """An exception would kill the server."""
    prefixes = [prefill(engine, PROMPTS[0]), prefill(engine, prompt), prefill(engine, PROMPTS[2])]
    answers, complete, state = decode(engine, prefixes, STEPS, STEPS)
    assert answers == [expected[0], [], expected[2]]
    assert complete == [False, True, False]
    assert state.decode.length_B[1] == 0
    assert "a request gets an empty answer" in caplog.text


def long_engine(quantize_kv):
    """Requests of four pages."""
    engine, params = tiny_engine(CONFIG, slots=2, cache_length=512, prefill_chunk=512, quantize_kv=quantize_kv)
    engine.get_tokenizer = byte_tokenizer
    return JetStreamEngine(engine, params)


@pytest.fixture(scope="module")
def long():
    return long_engine("none")


@pytest.mark.parametrize(("before", "behind"), [(5, 3), (127, 1), (128, 1), (130, 200), (300, 5), (256, 256), (3, 0)])
def test_tokens_go_on_behind_an_existing_prefix(long, before, behind):
    """As if all had been given at once; the prefix serves again, and one that goes on can be gone on from."""
    text = [7 * n % 250 for n in range(before + behind)]
    existing = prefill(long, text[:before])
    kept = jax.tree.map(np.array, existing)
    extended = [prefill(long, text[before:], existing) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.array, existing))
    assert length_of(extended[0]) == len(text)
    if behind > 1:
        extended[1] = prefill(long, text[-1:], prefill(long, text[before:-1], existing))
    (expected,), _, _ = decode(long, [prefill(long, text)], STEPS, STEPS)
    answers, _, _ = decode(long, extended, STEPS, STEPS)
    assert answers == [expected] * 2


def test_codes_of_an_existing_prefix_are_kept():
    """With their scales: what stands behind them reads the rounded rows, as a decode step does."""
    long, text = long_engine("int8"), [7 * n % 250 for n in range(200)]
    existing = prefill(long, text[:150])
    extended = prefill(long, text[150:], existing)
    assert length_of(extended) == 200
    of_both = [jax.tree.map(lambda leaf: np.array(leaf), prefix.text.kv) for prefix in (existing, extended)]
    np.testing.assert_array_equal(*(kv.rows[:, :, :128] for kv in of_both))
    np.testing.assert_array_equal(*(kv.scales[..., :128] for kv in of_both))
    whole = prefill(long, text).text.kv
    np.testing.assert_allclose(of_both[1].scales[..., :200], np.asarray(whole.scales)[..., :200], rtol=0.2)


def test_an_existing_prefix_that_cannot_be_answered_counts_as_none(engine, expected):
    prefixes = [prefill(engine, prompt, prefill(engine, [])) for prompt in PROMPTS]
    assert decode(engine, prefixes, STEPS, STEPS)[0] == expected
    longest = prefill(engine, [7] * 128)
    assert length_of(prefill(engine, [7], longest)) == 0, "one token more than the longest prompt"


def test_a_cache_without_pages_for_all_slots_is_refused():
    engine, params = tiny_engine(CONFIG, slots=3, cache_length=256, cache_tokens=640)
    with pytest.raises(RefusedError, match="cache_tokens=640 must be at least 768 under JetStream, where each of 3"):
        JetStreamEngine(engine, params)


def test_an_engine_that_drafts_is_refused():
    engine, params = tiny_engine(CONFIG, slots=3, cache_length=256, speculate="auto")
    with pytest.raises(RefusedError, match="leave --speculate out"):
        JetStreamEngine(engine, params)


def test_where_slots_are_left_out_there_are_as_many_as_the_cache_holds():
    config = with_pages_for_all(EngineConfig(slots=8, cache_length=256, cache_tokens=640))
    assert config.chosen == (2, 256, 640)
    assert with_pages_for_all(EngineConfig(slots=2, cache_length=256, cache_tokens=640)).slots == 2
    with pytest.raises(RefusedError, match="in one piece; leave --prefill-chunk out"):
        create_engine(jax.devices()[:1], EngineConfig(prefill_chunk=256))


def test_a_prefix_moves_to_another_mesh(engine, expected):
    """Disaggregated: prefill on two devices, decode on a third; the Driver's own call in between."""
    ahead = JetStreamEngine(*text_engine(jax.devices()[1:3], byte_tokenizer()))
    made = [prefill(ahead, prompt) for prompt in PROMPTS]
    prefixes = [jax.device_put(prefix, engine.get_prefix_destination_sharding()) for prefix in made]
    assert prefixes[0].text.kv.rows.devices() == set(jax.devices()[:1])
    answers, _, _ = decode(engine, prefixes, STEPS, STEPS)
    assert answers == expected


def test_text_is_padded_as_jetstream_pads(engine):
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    padded, length = tokenizer.encode("Hi", jax_padding=True)
    assert isinstance(padded, jax.Array)
    assert (padded.tolist(), length) == ([NO_BOS, 72, 105] + [0] * 13, 3)
    assert tokenizer.encode("Hi", prefill_lengths=[4], jax_padding=False)[0].tolist() == [NO_BOS, 72, 105, 0]
    assert tokenizer.stop_tokens == {END}
    assert (tokenizer.eos_id, tokenizer.pad_id) == (END, 0)


@pytest.mark.parametrize("text", ["a", " b c", "😀", "é 你好", "a😀😀b", "<0x", ""])
def test_characters_of_several_tokens_are_joined(text):
    """Each token decoded alone, then held back and joined as JetStream's orchestrator does it."""
    tokenizer = JetStreamTokenizer(byte_tokenizer())
    pieces = [tokenizer.decode([token_id]) for token_id in byte_tokenizer().encode(text)]
    assert all(token_utils.is_byte_token(piece) == (len(piece.encode()) > 1 and piece[0] == "<") for piece in pieces)
    assert token_utils.text_tokens_to_str(pieces) == text


def test_a_whole_answer_decodes_too():
    assert JetStreamTokenizer(byte_tokenizer()).decode([97, 256, 257, END]) == "a😀"


def test_a_model_without_a_tokenizer_answers_token_ids_alone(native, expected, caplog):
    bare = JetStreamEngine(*native)
    bare._tokenizer = JetStreamTokenizer(NoTokenizer("tiny", vocab_size=260, bos_id=None, stop_ids=frozenset()))
    assert bare._tokenizer.eos_id == NO_TOKEN
    answers, complete, _ = decode(bare, [prefill(bare, PROMPTS[0]), prefill(bare, "Hi")], STEPS, STEPS)
    assert answers == [expected[0], []]
    assert complete == [False, True]
    assert "outside the vocabulary" in caplog.text
