"""Sampling against sorted NumPy references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.sampling import choose
from slipstream.engine_impl.sampling.mask import Mask
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.sampling.slots import SlotSampling

from tests.arrays import array

VOCABULARY = 500
cut = jax.jit(choose.cut)


@jax.jit
def sample(logits_BV, count_BV, sampling, position_B):
    return choose.sample(logits_BV, lambda: count_BV, sampling, position_B, Mask.nothing(*logits_BV.shape))


def logits(seed=0, slots=1):
    return np.random.default_rng(seed).normal(size=(slots, VOCABULARY)).astype(np.float32) * 3


def draws(logits_V, count=4000, **params):
    """The same request at `count` positions: independent draws."""
    sampling = SlotSampling.of(SamplingParams(temperature=params.pop("temperature", 1.0), **params))
    many = jax.tree.map(lambda value: jnp.broadcast_to(value, (count, *value.shape)), sampling)
    shape = count, VOCABULARY
    nothing_said_BV = jnp.zeros(shape, jnp.uint16)
    return np.asarray(sample(jnp.broadcast_to(logits_V, shape), nothing_said_BV, many, jnp.arange(count)))


def kept_by_sorting(logits_V, top_k, top_p, temperature):
    """Tokens that top-k, then top-p keep, as Hugging Face defines them: sorted, cumulated."""
    order = np.argsort(-logits_V)[: top_k or None]
    scaled = logits_V[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    return set(order[: int(np.searchsorted(np.cumsum(p), top_p)) + 1] if top_p < 1 else order)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [
        (1, 1.0, 1.0),
        (7, 1.0, 1.0),
        (0, 0.5, 1.0),
        (0, 1e-6, 2.0),
        (0, 0.0, 1.0),
        (20, 0.7, 0.5),
        (500, 0.999, 1.0),
        (9999, 1.0, 1.0),
    ],
)
def test_only_kept_tokens_are_drawn_and_all_of_them(top_k, top_p, temperature):
    logits_V = logits()[0]
    kept = kept_by_sorting(logits_V, min(top_k, VOCABULARY), top_p, temperature)
    drawn = set(draws(logits_V, top_k=top_k, top_p=top_p, temperature=temperature))
    assert drawn <= kept
    if len(kept) < 20:
        assert drawn == kept


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1.0, 0.05), (12, 1.0, 0.0), (0, 0.6, 0.0), (30, 0.9, 0.02), (5, 0.99, 1.0)]
)
def test_the_cuts_are_transformers(top_k, top_p, min_p, temperature):
    """In its order: temperature, top-k, top-p, min-p; beside a slot that asks for nothing."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = logits(seed=5, slots=2)
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)]
    warpers[1:1] = [TopKLogitsWarper(top_k)] if top_k else []
    expected = torch.tensor(logits_BV[:1])
    for warp in warpers:
        expected = warp(torch.zeros((1, 0)), expected)

    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    sampling = jax.tree.map(
        lambda *values: np.stack(values), SlotSampling.of(params), SlotSampling.of(SamplingParams())
    )
    scaled_BV = logits_BV / np.array([[temperature], [1]], np.float32)
    kept_BV = cut(scaled_BV, sampling)
    np.testing.assert_allclose(kept_BV[:1], expected, rtol=1e-6)
    np.testing.assert_array_equal(kept_BV[1], logits_BV[1])


def test_greedy_tokens_are_penalised_too():
    """The likeliest token is in the text; the second likeliest is not."""
    logits_BV = logits(slots=2)
    first, second = np.argsort(-logits_BV[0])[:2]
    count_BV = jnp.zeros(logits_BV.shape, jnp.uint16).at[:, first].set(1)
    params = [SamplingParams(repetition_penalty=10), SamplingParams()]
    sampling = jax.tree.map(lambda *values: np.stack(values), *map(SlotSampling.of, params))
    token_B = sample(jnp.stack([logits_BV[0]] * 2), count_BV, sampling, array([4, 4]))
    assert token_B.tolist() == [second, first]


def test_the_draws_follow_the_softmax():
    """20,000 draws, the ten likeliest tokens: within five standard errors of their probability."""
    logits_V = logits()[0]
    p = np.exp(logits_V.astype(np.float64) / 1.5)
    p /= p.sum()
    counts = np.bincount(draws(logits_V, count=20_000, temperature=1.5, seed=11), minlength=VOCABULARY)
    for token in np.argsort(-p)[:10]:
        assert abs(counts[token] / 20_000 - p[token]) < 5 * np.sqrt(p[token] / 20_000)


def test_ties_at_the_border_are_all_kept():
    logits_V = np.full(VOCABULARY, -5.0, np.float32)
    logits_V[[3, 8, 9]] = 2.0
    assert set(draws(logits_V, count=200, top_k=2)) == {3, 8, 9}


def test_greedy_slots_are_untouched_by_the_others():
    logits_BV = logits(slots=3)
    params = [SamplingParams(), SamplingParams(temperature=5.0, top_k=3), SamplingParams()]
    sampling = jax.tree.map(lambda *values: np.stack(values), *map(SlotSampling.of, params))
    nothing_said_BV = jnp.zeros(logits_BV.shape, jnp.uint16)
    token_B = sample(array(logits_BV), nothing_said_BV, sampling, array([4, 4, 4]))
    assert token_B[0] == logits_BV[0].argmax()
    assert token_B[2] == logits_BV[2].argmax()


def test_the_first_of_the_largest_is_chosen():
    """Equal ones, nothing but -inf, a NaN: always a token, and of the likeliest the first."""
    logits_BV = np.full((4, VOCABULARY), -np.inf, np.float32)
    logits_BV[0, [7, 70]] = 1.0
    logits_BV[1, [0, VOCABULARY - 1]] = np.inf
    logits_BV[3, 5] = np.nan
    greedy = jax.tree.map(lambda value: np.stack([value] * 4), SlotSampling.of(SamplingParams()))
    nothing_said_BV = jnp.zeros(logits_BV.shape, jnp.uint16)
    token_B = sample(array(logits_BV), nothing_said_BV, greedy, jnp.zeros(4, jnp.int32))
    assert token_B[:3].tolist() == [7, 0, 0]
    assert 0 <= token_B[3] < VOCABULARY


def test_an_infinite_logit_and_negative_zero_do_not_confuse_the_order():
    logits_V = np.full(VOCABULARY, -np.inf, np.float32)
    logits_V[[1, 2, 3]] = [0.0, -0.0, 1.0]
    assert set(draws(logits_V, count=300, top_k=3)) == {1, 2, 3}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": -0.1}, "top_p=-0.1 must be from 0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2**31}, "top_k=2147483648 must be from 0 .* to 2147483647"),
        ({"min_p": -0.01}, "min_p=-0.01 must be from 0"),
        ({"min_p": 1.01}, "min_p=1.01"),
        ({"min_p": float("nan")}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be positive"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 must be from -2 to 2"),
        ({"frequency_penalty": -2.1}, "frequency_penalty=-2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logprobs": -1}, "logprobs=-1 must be from 0"),
        ({"logprobs": 21}, "logprobs=21 must be from 0 .* to 20"),
        ({"seed": -1}, "seed=-1 must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296"),
    ],
)
def test_parameters_out_of_range_are_refused(params, message):
    with pytest.raises(RefusedError, match=message):
        SamplingParams(**params)
