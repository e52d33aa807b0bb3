"""Penalties and the counts behind them, against transformers and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from slipstream.engine_impl.sampling import penalties
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.sampling.penalties import FULL, IN_ANSWER, IN_PROMPT
from slipstream.engine_impl.sampling.slots import SlotSampling

VOCABULARY = 50
count_answer, penalise = jax.jit(penalties.count_answer), jax.jit(penalties.penalise)
counts_of_prompt = jax.jit(penalties.counts_of_prompt, static_argnums=2)
PROMPT, ANSWER = [3, 7, 7, 20], [7, 11, 11, 49]


def slots(*params):
    return jax.tree.map(lambda *values: np.stack(values), *map(SlotSampling.of, params))


def counted(sampling, prompts, answers):
    """As the engine counts: a padded prompt, then one token a step."""
    padded = [np.array([*prompt, *[9] * (8 - len(prompt))]) for prompt in prompts]
    count_BV = jnp.stack(
        [counts_of_prompt(row, jnp.int32(len(prompt)), VOCABULARY) for row, prompt in zip(padded, prompts, strict=True)]
    )
    for token_B in np.array(answers).T:
        count_BV = count_answer(count_BV, jnp.asarray(token_B), sampling)
    return count_BV


def test_counts_tell_prompt_from_answer_and_ignore_padding():
    (count_V,) = np.asarray(counted(slots(SamplingParams(presence_penalty=1)), [PROMPT], [ANSWER]))
    expected = np.zeros(VOCABULARY)
    expected[[3, 7, 20]] = IN_PROMPT
    expected[[7, 11, 49]] += np.array([1, 2, 1]) * IN_ANSWER
    assert count_V.tolist() == expected.tolist()


def test_the_largest_count_does_not_wrap():
    count_BV = jnp.full((1, VOCABULARY), FULL - 1, jnp.uint16)
    sampling = slots(SamplingParams(frequency_penalty=1))
    for _ in range(4):
        count_BV = count_answer(count_BV, jnp.array([5]), sampling)
    assert FULL < int(count_BV[0, 5]) < 2**16
    assert int(count_BV[0, 4]) == FULL - 1


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
    np.testing.assert_allclose(penalise(jnp.asarray(logits_BV), count_BV, sampling), expected, rtol=1e-6)


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
    logits_BV = jnp.asarray(np.random.default_rng(1).normal(size=(2, VOCABULARY)).astype(np.float32))
    sampling = slots(SamplingParams(repetition_penalty=3, frequency_penalty=2), SamplingParams())
    penalised_BV = penalise(logits_BV, counted(sampling, [PROMPT] * 2, [ANSWER] * 2), sampling)
    np.testing.assert_array_equal(penalised_BV[1], logits_BV[1])
    assert (penalised_BV[0] != logits_BV[0]).sum() == len({*PROMPT, *ANSWER})
