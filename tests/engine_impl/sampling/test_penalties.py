"""Penalties and the counts behind them, against transformers and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from slipstream.engine_impl.sampling import penalties
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.sampling.penalties import FULL, IN_ANSWER, IN_PROMPT, counts_of_text
from slipstream.engine_impl.sampling.slots import SlotSampling

from tests.arrays import array

VOCABULARY = 50
MESH = Mesh(np.array(jax.devices()[:1]), ("tensor",))
penalise = jax.jit(penalties.penalise)
PROMPT, ANSWER = [3, 7, 7, 20], [7, 11, 11, 49]


def slots(*params):
    return jax.tree.map(lambda *values: np.stack(values), *map(SlotSampling.of, params))


@functools.partial(jax.jit, static_argnames="mesh")
def count_answer(count_BV, token_N, counted_N, mesh=MESH, slot_N=None):
    slot_N = jnp.arange(len(token_N)) if slot_N is None else slot_N
    return penalties.count_answer(count_BV, slot_N, token_N.reshape(len(token_N), -1), counted_N * 1, mesh)


def counted(sampling, prompts, answers):
    """As the engine counts: the prompt, then one token a step."""
    count_BV = array(np.stack([counts_of_text(prompt, len(prompt), VOCABULARY) for prompt in prompts]))
    for token_B in np.array(answers).T:
        count_BV = count_answer(count_BV, array(token_B), sampling.is_penalised)
    return count_BV


def test_counts_tell_prompt_from_answer():
    """Step by step, and of a text that has an answer already."""
    (count_V,) = np.asarray(counted(slots(SamplingParams(presence_penalty=1)), [PROMPT], [ANSWER]))
    expected = np.zeros(VOCABULARY)
    expected[[3, 7, 20]] = IN_PROMPT
    expected[[7, 11, 49]] += np.array([1, 2, 1]) * IN_ANSWER
    assert count_V.tolist() == expected.tolist()
    assert counts_of_text(PROMPT + ANSWER, len(PROMPT), VOCABULARY).tolist() == expected.tolist()


@pytest.mark.parametrize("prompt", [[], [5]])
def test_the_largest_count_does_not_wrap(prompt):
    """A step more or less: both ways to count end at the same number."""
    text = [*prompt, *[5] * 2**15]
    count_BV = array(counts_of_text(text[:-3], len(prompt), VOCABULARY))[None]
    for _ in range(6):
        count_BV = count_answer(count_BV, array([5]), array([True]))
    assert FULL < int(count_BV[0, 5]) < 2**16
    assert int(count_BV[0, 5]) == counts_of_text([*text, 5, 5], len(prompt), VOCABULARY)[5]
    assert int(count_BV[0, 4]) == 0


@pytest.mark.parametrize("vocabulary", [64, 50])
def test_chips_that_share_the_counts_count_what_one_does(vocabulary):
    """Slots in any order; one is not counted, and one is no slot at all."""
    count_BV = np.random.default_rng(0).integers(0, 9, (4, vocabulary)).astype(np.uint16)
    slot_N, token_N = array([2, 0, 4, 3]), array([7, vocabulary - 1, 1, 9])
    expected = count_BV.copy()
    for slot, token in ((2, 7), (0, vocabulary - 1)):
        expected[slot, token] += IN_ANSWER
    is_counted_N = array([True, True, True, False])
    for chips in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:chips]), ("tensor",))
        told = count_answer(array(count_BV), token_N, is_counted_N, mesh=mesh, slot_N=slot_N)
        np.testing.assert_array_equal(told, expected)


def test_several_tokens_are_counted_one_behind_another():
    """The first so many of a slot's, the same one more than once; and what stands behind each of them."""
    count_BV = np.random.default_rng(0).integers(0, 9, (4, 64)).astype(np.uint16)
    count_BV[2, 7] = FULL - 1
    slot_N, token_NW = array([2, 0, 1]), array([[7, 7, 63], [5, 5, 5], [1, 2, 3]])
    expected = count_BV.copy()
    expected[2, 7], expected[0, 5] = FULL - 1 + IN_ANSWER, expected[0, 5] + 3 * IN_ANSWER
    for chips in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:chips]), ("tensor",))
        told = count_answer(array(count_BV), token_NW, array([2, 3, 0]), mesh=mesh, slot_N=slot_N)
        np.testing.assert_array_equal(told, expected)
    behind = penalties.counts_behind(array(count_BV[[2, 0]]), token_NW[:2])
    assert [int(counts[1, 5] - count_BV[0, 5]) for counts in behind] == [0, 2, 4, 6]
    assert [int(counts[0, 7]) for counts in behind] == [FULL - 1, FULL + 1, FULL + 1, FULL + 1]


def test_nothing_is_counted_while_nobody_asks():
    assert not np.asarray(counted(slots(SamplingParams(temperature=1)), [[]], [ANSWER])).any()


@pytest.mark.parametrize("penalty", [1.3, 0.6, 1.0])
def test_repetition_is_transformers(penalty):
    """Over prompt and answer, positive logits divided and negative ones multiplied, for slots with different texts."""
    from transformers import RepetitionPenaltyLogitsProcessor

    logits_BV = np.random.default_rng(0).normal(size=(2, VOCABULARY)).astype(np.float32) * 4
    sampling = slots(*[SamplingParams(repetition_penalty=penalty, presence_penalty=0)] * 2)
    texts = [PROMPT + ANSWER, ANSWER + PROMPT]
    # A penalty of 1 counts nothing, and need not.
    count_BV = counted(sampling, [PROMPT, ANSWER], [ANSWER, PROMPT])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.LongTensor(texts), torch.tensor(logits_BV))
    np.testing.assert_allclose(penalise(array(logits_BV), count_BV, sampling), expected, rtol=1e-6)


def test_presence_and_frequency_by_hand():
    """Of the answer alone: 7 stands once in it (and twice in the prompt), 11 twice, 3 only in the prompt."""
    sampling = slots(SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25))
    penalised_BV = penalise(jnp.ones((1, VOCABULARY)), counted(sampling, [PROMPT], [ANSWER]), sampling)
    expected = np.ones(VOCABULARY)
    expected[[7, 49]] = 1 - 0.5 + 0.25
    expected[11] = 1 - 0.5 + 2 * 0.25
    np.testing.assert_array_equal(penalised_BV[0], expected)


def test_repetition_comes_first():
    sampling = slots(SamplingParams(repetition_penalty=2, presence_penalty=1, frequency_penalty=1))
    penalised_BV = penalise(jnp.full((1, VOCABULARY), 6.0), counted(sampling, [PROMPT], [ANSWER]), sampling)
    assert [float(penalised_BV[0, token]) for token in (0, 3, 7, 11)] == [6, 3, 1, 0]


def test_a_slot_without_penalties_keeps_its_logits_to_the_bit():
    logits_BV = array(np.random.default_rng(1).normal(size=(2, VOCABULARY)).astype(np.float32))
    sampling = slots(SamplingParams(repetition_penalty=3, frequency_penalty=2), SamplingParams())
    penalised_BV = penalise(logits_BV, counted(sampling, [PROMPT] * 2, [ANSWER] * 2), sampling)
    np.testing.assert_array_equal(penalised_BV[1], logits_BV[1])
    assert (penalised_BV[0] != logits_BV[0]).sum() == len({*PROMPT, *ANSWER})
