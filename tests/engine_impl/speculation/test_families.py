"""Steps of several tokens, in every family: they bring what they bring without drafts, and what transformers says."""

import itertools

import numpy as np
import pytest
import torch
from slipstream.engine_impl.sampling.params import SamplingParams

from ..models.against_transformers import reference_logits
from ..models.test_families import FAMILIES, PROMPTS, load, written_by_transformers
from .steps import told_by

TOKENS, WIDTH = 24, 4
SAMPLINGS = [SamplingParams(logprobs=0), SamplingParams(temperature=0.7, top_p=0.95, seed=5, logprobs=0)]

ON_EIGHT = {"gemma3"}
"""It has windows, and two ropes; and eight devices scan over the layers."""

ON_ONE = {"llama", "gemma2", "qwen3_moe", "gpt_oss", "smollm3", "phi3", "glm"}
"""A layer's own code takes rows and knows no slots, so norms, biases, factors and activations see no step's width. What
does is here: positions (ropes of all kinds, of a part of a head, layers without), windows, soft caps, sinks, kv heads
in groups, and how many rows the experts take."""

STEPS_OF_ONE = {"llama", "gemma3"}
"""Compared with steps of one token, a program more; the others with wide steps that nothing is predicted for."""


def _marks(family: str, devices: int) -> list[pytest.MarkDecorator]:
    is_chosen = family in (ON_ONE if devices == 1 else ON_EIGHT)
    return [pytest.mark.slow] if is_chosen else [pytest.mark.slow, pytest.mark.product]


CASES = [
    pytest.param(family, devices, id=f"{family}-{devices}", marks=_marks(family, devices))
    for family, devices in itertools.product(FAMILIES, (1, 8))
]


@pytest.mark.parametrize(("family", "devices"), CASES)
def test_no_draft_changes_a_token(family, devices, tmp_path_factory):
    """Drafts that are right, but for every seventh; greedy, and drawn beside it; over a page's border."""
    folder, reference = written_by_transformers(family, tmp_path_factory.getbasetemp())
    loaded = load(folder, devices, speculate="auto")
    cases = [(prompt, sampling, ()) for prompt, sampling in zip(PROMPTS, SAMPLINGS, strict=True)]
    plain, _ = told_by(loaded, cases, TOKENS, 1 if family in STEPS_OF_ONE else WIDTH)
    assert all(len({*one.tokens}) >= 4 for one in plain), "a model that repeats itself would prove little"
    assert_transformers_says_so(reference, plain)
    edited = [[(t + 1) % 101 if n % 7 == 6 else t for n, t in enumerate(one.tokens)] for one in plain]
    predicted = [(*case[:2], prediction) for case, prediction in zip(cases, edited, strict=True)]
    told, _ = told_by(loaded, predicted, TOKENS, [WIDTH, WIDTH, 1] if family in STEPS_OF_ONE else WIDTH)
    assert [one.tokens for one in told] == [one.tokens for one in plain]
    assert max(max(one.counts) for one in told) > 2


def assert_transformers_says_so(reference, plain):
    """Every token's log-probability, of both texts; and the greedy ones are the likeliest."""
    for prompt, one in zip(PROMPTS, plain, strict=True):
        logits_TV = reference_logits(reference, prompt + one.tokens[:-1])[len(prompt) - 1 :]
        logprob_TV = torch.log_softmax(torch.from_numpy(logits_TV), dim=-1).numpy()
        np.testing.assert_allclose(one.logprobs, logprob_TV[np.arange(TOKENS), one.tokens], atol=1e-4)
        assert prompt is not PROMPTS[0] or one.tokens == logits_TV.argmax(-1).tolist()
