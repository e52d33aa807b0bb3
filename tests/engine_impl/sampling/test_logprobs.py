"""Log-probabilities against torch's log_softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from slipstream.engine_impl.sampling.logprobs import likeliest, logprob_of, logprobs, prompt_logprobs
from slipstream.engine_impl.sampling.params import MAX_LOGPROBS

from tests.arrays import array

LOGPROBS, LIKELIEST = jax.jit(logprobs, static_argnums=3), jax.jit(likeliest, static_argnums=1)


def mesh(chips=1):
    return Mesh(np.array(jax.devices()[:chips]), ("tensor",))


def logits(slots, vocabulary):
    return np.random.default_rng(0).normal(size=(slots, vocabulary)).astype(np.float32) * 5


def softmax(logits_BV):
    return torch.tensor(logits_BV).log_softmax(-1)


@pytest.mark.parametrize("asked", [[-1, -1, -1], [-1, 0, -1], [0, -1, 20]])
def test_what_is_asked_for_is_torchs_and_the_rest_zero(asked):
    logits_BV, token_B = logits(3, 400), np.array([7, 399, 0])
    told = LOGPROBS(logits_BV, token_B, np.array(asked), mesh())
    expected = softmax(logits_BV)
    top = expected.topk(MAX_LOGPROBS)
    wants, wants_top = max(asked) >= 0, max(asked) > 0
    np.testing.assert_allclose(told.chosen_B, expected[[0, 1, 2], token_B] * wants, rtol=1e-5)
    np.testing.assert_array_equal(told.top_token_BP, top.indices * wants_top)
    np.testing.assert_allclose(told.top_BP, top.values * wants_top, rtol=1e-5)


@pytest.mark.parametrize(
    ("chips", "rows", "vocabulary"),
    [(1, 3, 101), (8, 3, 400), (8, 3, 160), (8, 3, 88), (8, 3, 101), (8, 16, 400), (8, 24, 400), (8, 48, 88)],
)
def test_chips_that_share_the_vocabulary_find_the_same(chips, rows, vocabulary):
    """Fewer than P entries a chip, and a vocabulary that they cannot divide, included; of rows in turns or at once."""
    logits_BV, devices = logits(rows, vocabulary), mesh(chips)
    axis = "tensor" if vocabulary % chips == 0 else None
    shared = jax.device_put(logits_BV, NamedSharding(devices, PartitionSpec(None, axis)))
    token_BP, logit_BP = LIKELIEST(shared, devices)
    expected = torch.tensor(logits_BV).topk(MAX_LOGPROBS)
    np.testing.assert_array_equal(token_BP, expected.indices)
    np.testing.assert_array_equal(logit_BP, expected.values)


def test_equally_likely_tokens_come_by_their_id():
    logits_BV, devices = np.zeros((1, 400), np.float32), mesh(8)
    shared = jax.device_put(logits_BV, NamedSharding(devices, PartitionSpec(None, "tensor")))
    assert LIKELIEST(shared, devices)[0].tolist() == [list(range(MAX_LOGPROBS))]


def test_bfloat16_logits_are_normalised_in_float32():
    logits_BV = array(logits(2, 4000), jnp.bfloat16)
    expected = softmax(np.asarray(logits_BV, np.float32))[[0, 1], [1, 2]]
    np.testing.assert_allclose(logprob_of(logits_BV, array([1, 2])), expected, rtol=1e-5)


@pytest.mark.parametrize(("rows", "asked"), [(16, 1), (16, 16), (128, 100), (192, 130), (256, 130), (512, 512)])
def test_a_prompts_logprobs_are_of_the_token_behind_each(rows, asked):
    """In chunks or not; where nobody asks, whatever the row holds, it is 0."""
    random = np.random.default_rng(rows)
    x_RD, weight_DV = random.normal(size=(rows, 8)).astype(np.float32), random.normal(size=(8, 50)).astype(np.float32)
    next_R = random.integers(0, 50, rows)
    x_RD[asked:], next_R[asked:] = np.nan, -1
    devices = mesh(1)

    def logits_of(some_RD, is_asked_R):
        return jnp.where(is_asked_R[:, None], some_RD @ weight_DV, jnp.nan)

    told = [prompt_logprobs(array(x_RD), array(next_R), jnp.int32(k), logits_of, devices) for k in (0, 3)]
    logprob_RV = softmax(x_RD[:asked] @ weight_DV)
    expected_R, top_RP = np.zeros(rows), np.zeros((rows, MAX_LOGPROBS))
    expected_R[:asked] = logprob_RV[np.arange(asked), next_R[:asked]]
    top_RP[:asked] = -np.sort(-logprob_RV)[:, :MAX_LOGPROBS]
    for of_tokens in told:
        np.testing.assert_allclose(of_tokens.chosen_B, expected_R, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(told[1].top_BP, top_RP, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(told[1].top_token_BP[:asked, 0], logprob_RV.argmax(-1))
    assert not np.asarray(told[1].top_token_BP[asked:]).any()
    assert not np.asarray(told[0].top_BP).any()
