"""Our engine under the hands of JetStream's last source: a first token with each prefill, several answers a prompt."""

from types import SimpleNamespace
from uuid import UUID

import jax
import numpy as np
import pytest
from slipstream.cli import main as cli
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.jetstream.engine import engine_api, engine_class, token_utils
from slipstream.engine_impl.jetstream.last_source import LastSourceAdapter
from slipstream.engine_impl.jetstream.tokenizer import NO_BOS, JetStreamTokenizer
from slipstream.server.config import ServerConfig
from slipstream.server.jetstream import host as jetstream_host

from ..text_models import BOS, CONFIG, byte_tokenizer, one_device_engine, text_engine
from ..tiny_models import greedy, tiny_engine
from . import last_api

PROMPTS = [[72, 105], list(b"Say so again."), [200, 3, 17]]
STEPS = 7
REQUEST = UUID(int=1)

Engine = engine_class(last_api)


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
    return Engine(*native)


class Answers:
    """What its detokenize thread makes of the results: answers until they are complete."""

    def __init__(self, engine, max_tokens):
        self.stop_tokens = engine.build_tokenizer(engine.get_tokenizer()).stop_tokens
        self.max_tokens = max_tokens
        self.token_ids, self.logprobs, self.complete = {}, {}, {}

    def take(self, requests, data):
        for request, token, valid, length, log_prob in zip(
            requests, data.tokens, data.valid, data.lengths, data.log_prob, strict=True
        ):
            answer = self.token_ids.setdefault(request, [])
            self.complete[request] = self.complete.get(request, False) or length > self.max_tokens
            if not self.complete[request]:
                self.complete[request] = not valid[0] or int(token[0]) in self.stop_tokens
            if not self.complete[request]:
                answer.append(int(token[0]))
                assert length == len(answer)
                self.logprobs.setdefault(request, []).append(float(log_prob[0]))


def padded(engine, prompt, **options):
    """As its prefill thread pads token ids."""
    tokenizer = engine.build_tokenizer(engine.get_tokenizer())
    options = {"is_bos": True, "max_prefill_length": engine.max_prefill_length, "jax_padding": False} | options
    tokens, length = token_utils.pad_tokens(prompt, tokenizer.bos_id, tokenizer.pad_id, **options)
    return {"params": engine.load_params(), "padded_tokens": tokens, "true_length": length}


def decode(engine, prompts, max_tokens, steps):
    """A slot each: answers by slot."""
    state, answers = engine.init_decode_state(), Answers(engine, max_tokens)
    for slot, prompt in enumerate(prompts):
        prefix, first = engine.prefill(**padded(engine, prompt), request_id=REQUEST)
        answers.take([slot], first.convert_to_numpy().get_result_at_slot(0))
        state = engine.insert(prefix, state, slot=slot, request_id=REQUEST)
        answers.complete[slot] = False  # as that source does
    state = run(engine, state, answers, range(len(prompts)), steps)
    return answers, state


def run(engine, state, answers, slots, steps):
    for _ in range(steps):
        state, result = engine.generate(engine.load_params(), state)
        result.copy_to_host_async()
        result = result.convert_to_numpy()
        for slot in slots:
            if not answers.complete[slot]:
                answers.take([slot], result.get_result_at_slot(slot))
                if answers.complete[slot]:
                    engine.free_resource(slot)
    return state


def test_it_is_recognised_by_its_members():
    assert issubclass(Engine, last_api.Engine)
    assert issubclass(Engine, LastSourceAdapter)
    assert not Engine.__abstractmethods__
    assert not issubclass(engine_class(engine_api), LastSourceAdapter), "the wheel's"


def test_an_engine_with_members_of_no_known_source_is_refused():
    unknown = type("Engine", (last_api.Engine,), {"pause": last_api.Engine.bulk_insert})
    with pytest.raises(RefusedError, match=r"members that are unknown here: pause; .*0\.2\.2"):
        engine_class(SimpleNamespace(Engine=unknown))


def test_its_own_server_is_to_be_started(monkeypatch, capsys):
    monkeypatch.setattr(jetstream_host, "engine_api", last_api)
    with pytest.raises(RefusedError, match=r"runs google-jetstream 0\.2\.2; start the last source's own server"):
        jetstream_host.check_supported(ServerConfig())
    assert cli.run(["serve", "--orchestrator", "jetstream"]) == cli.BAD_INPUT
    assert "create_engine in its ServerConfig" in capsys.readouterr().err


def test_what_it_says_of_itself(engine):
    assert (engine.max_concurrent_decodes, engine.samples_per_slot, engine.max_prefill_length) == (3, 1, 128)
    assert (engine.use_chunked_prefill, engine.prefill_chunk_size) == (False, 128)
    assert engine.colocated_cpus == jax.devices("cpu")


def test_the_first_token_comes_with_the_prefill(engine, expected):
    answers, _ = decode(engine, PROMPTS, STEPS, STEPS - 1)
    assert [answers.token_ids[slot] for slot in range(3)] == expected
    assert not any(answers.complete.values())
    answers, state = decode(engine, PROMPTS, STEPS, STEPS)
    assert [answers.token_ids[slot] for slot in range(3)] == expected
    assert all(answers.complete.values())
    state, result = engine.generate(engine.load_params(), state)
    assert state.decode.length_B.tolist() == [0, 0, 0], "freed"
    assert np.asarray(result.data)[:, 1].tolist() == [0, 0, 0]


def test_log_probabilities_are_the_models_own(engine, native):
    """Those that scoring the same tokens gives."""
    own, params = native
    answers, _ = decode(engine, PROMPTS[:2], STEPS, STEPS - 1)
    page_NJ = np.arange(own.sizes.pages_per_slot, dtype=np.int32)[None]
    prefix, _ = engine.prefill(**padded(engine, PROMPTS[1]))
    state, told = own.insert(prefix.text, own.init_decode_state(), [0], page_NJ), []
    for token in answers.token_ids[1][1:]:
        state, logprob_N = own.score_step(params, state, np.zeros(1, np.int32), page_NJ, np.array([token], np.int32))
        told.append(float(logprob_N[0]))
    np.testing.assert_allclose(answers.logprobs[1][1:], told, rtol=1e-5, atol=1e-5)
    assert answers.logprobs[1][0] < 0


@pytest.mark.parametrize("at", [0, 3])
def test_a_stop_token_ends_the_answer_and_empties_the_slot(native, expected, monkeypatch, at):
    """The first one too, which the prefill told."""
    stop_id = expected[1][at]
    monkeypatch.setattr(native[0], "get_tokenizer", lambda: byte_tokenizer(stop_ids=frozenset({stop_id})))
    stopping = Engine(*native)
    answers, state = decode(stopping, PROMPTS, 99, STEPS - 1)
    ends = [answer.index(stop_id) if stop_id in answer else STEPS for answer in expected]
    assert [answers.token_ids.get(slot, []) for slot in range(3)] == [
        a[:end] for a, end in zip(expected, ends, strict=True)
    ]
    assert answers.complete[1]
    assert state.decode.length_B[1] == 0


def test_a_slot_is_not_freed_under_the_request_that_took_it_over(engine, expected):
    """JetStream offers a slot again before it tells that the request there is over."""
    state = engine.init_decode_state()
    for prompt in (PROMPTS[1], PROMPTS[0]):
        prefix, first = engine.prefill(**padded(engine, prompt))
        state = engine.insert(prefix, state, slot=0)
    engine.free_resource(0)  # the first one's
    answers = Answers(engine, 99)
    answers.take([0], first.convert_to_numpy().get_result_at_slot(0))
    state = run(engine, state, answers, [0], STEPS - 1)
    assert answers.token_ids[0] == expected[0]
    engine.free_resource(0)
    engine.free_resource(0)  # once too often
    state, _ = engine.generate(engine.load_params(), state)
    assert state.decode.length_B[0] == 0


def multisampled(engine, prompt, count, rng=None):
    prefix, first = engine.prefill_multisampling(**padded(engine, prompt), rng=rng, num_samples=count)
    answers, requests = Answers(engine, 99), [*range(count)]
    answers.take(requests, first.convert_to_numpy().get_result_at_slot(0))
    state = engine.bulk_insert(prefix, engine.init_decode_state(), slots=requests)
    for _ in range(STEPS - 1):
        state, result = engine.generate(engine.load_params(), state)
        answers.take(requests, result.convert_to_numpy().get_result_at_slots(tuple(requests)))
    return [answers.token_ids[request] for request in requests]


def test_without_a_key_all_answers_are_greedy(engine, expected):
    assert multisampled(engine, PROMPTS[1], 3) == [expected[1]] * 3


def test_with_a_key_answers_are_drawn_and_the_key_decides(engine, expected):
    drawn = multisampled(engine, PROMPTS[1], 3, jax.random.key(7))
    assert len({tuple(answer) for answer in (*drawn, expected[1])}) == 4
    assert multisampled(engine, PROMPTS[1], 3, jax.random.key(7)) == drawn
    assert multisampled(engine, PROMPTS[1], 3, jax.random.PRNGKey(8)) != drawn


def test_each_answer_needs_a_slot(engine):
    prefix, _ = engine.prefill_multisampling(**padded(engine, PROMPTS[0]), num_samples=2)
    for slots in ([0], [0, 1, 2]):
        with pytest.raises(RefusedError, match=f"{len(slots)} slots for a prefix of 2 answers"):
            engine.bulk_insert(prefix, engine.init_decode_state(), slots)
    for count in (0, 4):
        with pytest.raises(RefusedError, match=f"num_samples={count} must be from 1 to 3"):
            engine.prefill_multisampling(**padded(engine, PROMPTS[0]), num_samples=count)


@pytest.mark.parametrize("prompt", [[], [72, 260], [7] * 127 + [-5]], ids=len)
def test_a_prompt_that_cannot_be_answered_gets_empty_answers(engine, expected, prompt, caplog):
    answers, _ = decode(engine, [PROMPTS[0], prompt, PROMPTS[2]], 99, STEPS - 1)
    assert [answers.token_ids[slot] for slot in range(3)] == [expected[0], [], expected[2]]
    assert multisampled(engine, prompt, 2) == [[], []]
    assert "a request gets an empty answer" in caplog.text


def test_a_sampler_is_refused(engine):
    with pytest.raises(RefusedError, match="sampler: not with this engine"):
        engine.prefill(**padded(engine, PROMPTS[0]), sampler=len)
    with pytest.raises(RefusedError, match="sampler: not with this engine"):
        engine.generate(engine.load_params(), None, sampler=len)


def in_chunks(engine, tokens, size, existing=None):
    """As that source computes a prompt in chunks: each behind the cache of those before it."""
    done = [] if existing is None else existing.common_prefix_tokens.tolist()
    for at in range(0, len(tokens), size):
        chunk = padded(engine, tokens[at : at + size], is_bos=False)
        prefix, first = engine.prefill(**chunk, existing_prefix=existing)
        done += tokens[at : at + size]
        existing = last_api.ExistingPrefix(cache=prefix["cache"], common_prefix_tokens=np.array(done))
    return prefix, first


@pytest.fixture(scope="module")
def long():
    """Requests of four pages."""
    own, params = tiny_engine(CONFIG, slots=2, cache_length=512, prefill_chunk=512)
    own.get_tokenizer = byte_tokenizer
    return Engine(own, params)


@pytest.mark.parametrize(("length", "size"), [(10, 4), (300, 128), (300, 200)])
def test_tokens_go_on_behind_an_existing_prefix(long, length, size):
    text = [7 * n % 250 for n in range(length)]
    expected = decode(long, [text], 99, STEPS - 1)[0].token_ids[0]
    tokens = [NO_BOS, *text]  # which a model without BOS must not see
    prefix, first = in_chunks(long, tokens, size)
    assert prefix.prompt_ids() == text
    cut = last_api.ExistingPrefix(cache=prefix["cache"], common_prefix_tokens=np.array(tokens[: 1 + length // 2]))
    prefix, first = in_chunks(long, tokens[1 + length // 2 :], size, cut)
    answers = Answers(long, 99)
    answers.take([0], first.convert_to_numpy().get_result_at_slot(0))
    run(long, long.insert(prefix, long.init_decode_state(), 0), answers, [0], STEPS - 1)
    assert answers.token_ids[0] == expected
    with pytest.raises(KeyError):
        prefix["logits"]


def test_a_token_that_looks_like_a_bos_within_a_prompt_is_kept(native):
    with_bos = Engine(*native)
    with_bos._tokenizer = JetStreamTokenizer(byte_tokenizer(adds_bos=True))
    prefix, _ = in_chunks(with_bos, [BOS, 72, BOS, BOS, 105], 2)
    assert prefix.prompt_ids() == [BOS, 72, BOS, BOS, 105]


def test_a_prefix_of_other_tokens_is_not_gone_on_from(engine, caplog):
    prefix, _ = engine.prefill(**padded(engine, PROMPTS[1]))
    other = last_api.ExistingPrefix(cache=prefix["cache"], common_prefix_tokens=np.array(PROMPTS[0]))
    _, first = engine.prefill(**padded(engine, [7], is_bos=False), existing_prefix=other)
    assert np.asarray(first.data)[:, 1].tolist() == [0]
    assert "must begin with its common_prefix_tokens" in caplog.text


def test_a_prefix_moves_to_another_mesh(engine, expected):
    """Disaggregated: prefill on two devices, decode on a third; with all its answers."""
    ahead = Engine(*text_engine(jax.devices()[1:3], byte_tokenizer()))
    prefix, first = ahead.prefill_multisampling(**padded(ahead, PROMPTS[1]), num_samples=2)
    moved = jax.device_put(prefix, engine.get_prefix_destination_sharding())
    assert moved.token_M.devices() == set(jax.devices()[:1])
    answers = Answers(engine, 99)
    answers.take([0, 2], first.convert_to_numpy().get_result_at_slot(0))
    run(engine, engine.bulk_insert(moved, engine.init_decode_state(), [0, 2]), answers, [0, 2], STEPS - 1)
    assert answers.token_ids == {0: expected[1], 2: expected[1]}


@pytest.mark.slow
def test_the_warm_up_leaves_all_slots_empty_and_nothing_to_compile(native, expected):
    warm = Engine(*native)
    warm.warm_up()
    assert warm.init_decode_state().decode.length_B.tolist() == [0, 0, 0]
    programs = [warm._before_step, warm._data, warm._take_up, warm._answer]
    compiled = [program._cache_size() for program in programs]
    answers, _ = decode(warm, PROMPTS, STEPS, STEPS - 1)
    assert [answers.token_ids[slot] for slot in range(3)] == expected
    assert [program._cache_size() for program in programs] == compiled
