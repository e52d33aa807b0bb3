"""Mixes of lengths, against shares worked out by hand."""

import numpy as np
import pytest
from slipstream.engine_impl.compiler.lengths import length_mix
from slipstream.engine_impl.errors import RefusedError


def test_fixed_lengths_are_met_at_each_token_of_their_answer():
    mix = length_mix("fixed:10,4")
    assert (mix.prompt_mean, mix.answer_mean, mix.longest) == (10, 4, 14)
    assert mix.live_share == pytest.approx([0] * 10 + [0.25] * 4)


def test_long_answers_are_met_more_often_than_they_are_sent():
    """Answers of 1 and 3 tokens, half each: of four steps one is the short one's, three are the long one's."""
    mix = length_mix("uniform:2-2,1-3")
    assert mix.answer_mean == pytest.approx(2)
    # Answers of more than 0, 1, 2 tokens: 1, 2/3, 1/3 of them; over the mean of 2.
    assert mix.live_share == pytest.approx([0, 0, 1 / 2, 1 / 3, 1 / 6])


def test_prompts_spread_what_is_live():
    """Prompts of 1 and 2, answers of 1: each in one step."""
    assert length_mix("uniform:1-2,1-1").live_share == pytest.approx([0, 0.5, 0.5])


def test_sharegpt_is_cut_at_both_ends_and_sums_to_1():
    mix = length_mix("sharegpt")
    for share in (mix.prompt_share, mix.answer_share):
        assert share.sum() == pytest.approx(1)
        assert len(share) == 1025
        assert share[:4].sum() == 0
        assert share[1024] > share[1023]  # all longer ones became this
    assert mix.live_share.sum() == pytest.approx(1)
    assert mix.longest == 2048


def test_long_mixes_take_no_time_to_speak_of():
    """131,072 x 131,072 pairs of lengths, by way of their spectra."""
    live_share = length_mix("uniform:1-131072,1-131072").live_share
    assert live_share @ np.arange(len(live_share)) == pytest.approx(65536.5 + 131071 / 3, rel=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        "", "fixed", "fixed:3", "fixed:0,3", "fixed:3,0", "fixed:1-2,3", "fixed:3,4,5", "uniform:3-2,1-1",
        "uniform:3,1-2", "uniform:1-2", "uniform:-1-2,1-2", "sharegpt:1", "zipf:1,2", "fixed:a,b",
    ],
)  # fmt: skip
def test_other_words_are_refused(spec):
    with pytest.raises(RefusedError, match="must be sharegpt, uniform:LOW-HIGH,LOW-HIGH or fixed:PROMPT,ANSWER"):
        length_mix(spec)
