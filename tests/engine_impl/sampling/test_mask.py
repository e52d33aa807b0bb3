"""Tokens that may not come are not chosen, whatever else is asked; a slot without a grammar keeps its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.sampling import choose
from slipstream.engine_impl.sampling.mask import Asked, Masks
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.sampling.slots import SlotSampling

from tests.arrays import array


def words(vocab_size, *token_ids):
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    bits[list(token_ids)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


@jax.jit
def sample(logits_BV, sampling, mask):
    count_BV, position_B = jnp.zeros(logits_BV.shape, jnp.uint16), jnp.full(len(logits_BV), 4)
    return choose.sample(logits_BV, lambda: count_BV, sampling, position_B, mask)


def chosen(logits_BV, params, mask):
    slots = [SlotSampling.of(one) for one in params]
    sampling = jax.tree.map(lambda *values: jnp.stack([array(value) for value in values]), *slots)
    return sample(logits_BV, sampling, mask).tolist()


@pytest.mark.parametrize("vocab_size", [32, 33, 70, 128])
def test_only_what_may_come_keeps_its_logits(vocab_size):
    logits_BV = array(np.random.default_rng(0).normal(size=(3, vocab_size)), jnp.float32)
    allowed = [0, 31, vocab_size - 1]
    mask = Masks(vocab_size, None).of(3, [Asked(1, (), words(vocab_size, *allowed))])
    masked_BV = np.asarray(mask.applied(logits_BV))
    assert (masked_BV[[0, 2]] == np.asarray(logits_BV)[[0, 2]]).all(), "nobody asked there"
    assert np.flatnonzero(np.isfinite(masked_BV[1])).tolist() == sorted({*allowed})
    assert (masked_BV[1, allowed] == np.asarray(logits_BV)[1, allowed]).all()


def test_tokens_beyond_the_tokenizers_may_not_come():
    mask = Masks(100, None).of(1, [Asked(0, (), words(40, 39))])
    assert np.flatnonzero(np.isfinite(mask.applied(jnp.zeros((1, 100))))[0]).tolist() == [39]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=5, seed=3),
        SamplingParams(temperature=1, top_k=1, seed=3),
        SamplingParams(temperature=1, top_p=0.1, seed=3),
        SamplingParams(temperature=1, min_p=1, seed=3),
        SamplingParams(logit_bias={7: 100.0}),
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(min_tokens=9, stop_token_ids=(7,)),
    ],
    ids=str,
)
def test_a_forbidden_token_is_never_chosen_and_neighbours_choose_as_ever(params):
    """Token 7 is by far the likeliest, and 5 of those that may come."""
    logits_V = np.zeros(70, np.float32)
    logits_V[7], logits_V[5] = 50, 20
    logits_BV = array(np.stack([logits_V] * 3))
    mask = Masks(70, None).of(3, [Asked(1, (), words(70, 3, 5, 64))])
    free, masked, other = chosen(logits_BV, [params] * 3, mask)
    assert [free, other] == chosen(logits_BV, [params] * 3, Masks(70, None).of(3, []))[::2]
    assert masked in (3, 5, 64)
    if params.temperature < 5:
        assert masked == 5


def test_nothing_is_brought_to_the_devices_again_while_nobody_asks():
    masks = Masks(70, None)
    assert masks.of(4, []) is masks.of(4, [])
    assert not masks.of(4, []).is_asked_B.any()
    assert masks.of(4, [], 8) is masks.of(4, [], 8) is not masks.of(4, [])
    asked = [Asked(0, (), words(70, 1))]
    assert masks.of(4, asked) is not masks.of(4, asked)


@pytest.mark.parametrize("forced", [(), (69,), (0, 31), (31, 32, 0), (5, 6, 7, 8), tuple(range(16))], ids=len)
@pytest.mark.parametrize("width", [1, 4])
def test_what_must_come_stands_before_what_may(width, forced):
    """In a step of four tokens; there what stands behind is nobody's to say, and it has no more places."""
    masks = Masks(70, None).of(3, [Asked(1, np.array(forced, np.int32), words(70, 3, 64))], width)
    logits_BWV = np.random.default_rng(0).normal(size=(3, width, 70)).astype(np.float32)
    masked_BWV = np.asarray(masks.applied(array(logits_BWV.reshape(-1, 70)))).reshape(logits_BWV.shape)
    assert (masked_BWV[[0, 2]] == logits_BWV[[0, 2]]).all(), "nobody asked there"
    places = [*([token_id] for token_id in forced), [3, 64], *[list(range(70))] * 4]
    for masked_V, logits_V, may_come in zip(masked_BWV[1], logits_BWV[1], places, strict=False):
        assert np.flatnonzero(np.isfinite(masked_V)).tolist() == may_come
        assert (masked_V[may_come] == logits_V[may_come]).all()
