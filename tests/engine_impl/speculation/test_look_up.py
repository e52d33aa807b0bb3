"""Where drafts are found in a text, and which of them are accepted: by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slipstream.engine_impl.api import Opening
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.engine_impl.speculation import look_up
from slipstream.engine_impl.speculation.drafts import Drafts, accept
from slipstream.engine_impl.speculation.texts import Texts, texts_of

from tests.arrays import array

S, W = 40, 4
looked_up = jax.jit(look_up.look_up, static_argnames=("width", "shortest"))


def found(text, prediction=(), prompt_length=None, **more):
    """The drafts behind a text whose last token is chosen already, as a list."""
    prompt_length = len(text) - 1 if prompt_length is None else prompt_length
    opening = Opening(text=text, prompt_length=prompt_length, sampling=SamplingParams(), prediction=prediction)
    texts = jax.tree.map(jnp.asarray, texts_of([opening], S))
    drafts = looked_up(texts, array([len(text) - 1]), width=W, **more)
    return drafts.token_NW[0, : int(drafts.count_N[0])].tolist()


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5, 6, 7]),  # three of the last tokens stood before
        ([9, 2, 3, 4, 5, 6, 7, 1, 2, 3], [4, 5, 6, 7]),  # two did
        ([9, 8, 3, 4, 5, 6, 7, 1, 2, 3], []),  # one did
        ([1, 2, 3, 4, 8, 2, 3, 5, 8, 1, 2, 3], [4, 8, 2, 3]),  # three are better than two behind them
        ([2, 3, 4, 8, 2, 3, 5, 8, 1, 2, 3], [5, 8, 1, 2]),  # of two places the last
        ([7, 7, 7], [7, 7, 7, 7]),  # what is not there yet is what repeats
        ([1, 2, 1, 2, 1], [2, 1, 2, 1]),
        ([5, 6, 7, 5, 6], [7, 5, 6, 7]),
        ([5], []),
        ([0, 0], []),  # the free part is no text
        ([3, 0, 3, 0], [3, 0, 3, 0]),
    ],
)
def test_what_followed_the_last_tokens_follows_again(text, drafts):
    assert found(text) == drafts


def test_a_shortest_repeat_may_be_asked_for():
    assert found([9, 2, 3, 4, 5, 6, 7, 1, 2, 3], shortest=3) == []
    assert found([9, 8, 3, 4, 5, 6, 7, 1, 2, 3], shortest=1) == [4, 5, 6, 7]


PROMPT = [30, 31, 32]


@pytest.mark.parametrize(
    ("answer", "prediction", "drafts"),
    [
        ([1], [1, 2, 3, 4, 5, 6], [2, 3, 4, 5]),  # its beginning, behind the prompt
        ([1, 2, 3], [1, 2, 3, 4, 5, 6], [4, 5, 6]),  # up to its end
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], []),
        ([9], [1, 2, 3, 4, 5, 6], []),  # wrong from the beginning
        ([1, 9, 3, 4], [1, 2, 3, 4, 5, 6], [5, 6]),  # found again behind what was wrong
        ([8, 1, 2], [1, 2, 3, 4, 5, 6], [3, 4, 5, 6]),  # and behind what was left out
        (list(range(1, 34)), list(range(1, 60)), [34]),  # cut to what is free: 34 of 37 tokens
        (list(range(1, 32)), list(range(1, 60)), [32, 33, 34]),
        ([31, 32], [4, 5], [4, 5]),  # where the answer ends as the prompt did
    ],
)
def test_a_prediction_is_found_like_any_place(answer, prediction, drafts):
    assert found(PROMPT + answer, prediction, prompt_length=3) == drafts


def test_the_answer_never_overwrites_what_is_predicted_of_it():
    """Token by token, with a prediction as long as the room."""
    answer = [n * 7 % 41 for n in range(S - 3)]
    opening = Opening(text=PROMPT + answer[:1], prompt_length=3, sampling=SamplingParams(), prediction=answer)
    texts = jax.tree.map(jnp.asarray, texts_of([opening], S))
    longer = jax.jit(Texts.longer)
    for length in range(3, S - 1):
        drafts = looked_up(texts, array([length]), width=W)
        right = answer[length - 2 : length - 2 + W]
        known = min(W, S - 3 - 3 - (length - 2))  # the last three are not predicted
        if known > 0:
            assert drafts.token_NW[0, :known].tolist() == right[:known]
        token_NW = array([[answer[length - 2]] * W])
        texts = longer(texts, array([0]), array([length + 1]), token_NW, array([1]))
    np.testing.assert_array_equal(texts.token_BS[0], PROMPT + answer)


def test_texts_grow_by_what_counts_and_not_beyond_their_end():
    texts = Texts(jnp.zeros((3, 6), jnp.int32), jnp.full(3, 6))
    token_NW = array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    texts = texts.longer(array([2, 0, 3]), array([1, 4, 0]), token_NW, array([2, 3, 3]))
    assert texts.token_BS.tolist() == [[0, 0, 0, 0, 4, 5], [0] * 6, [0, 1, 2, 0, 0, 0]]


def test_a_text_that_goes_on_has_what_it_would_have():
    """An answer that was interrupted: where its prediction lies depends on the prompt alone."""
    answer, predicted = [1, 2, 9, 4], [1, 2, 3, 4, 5, 6]
    opening = partial(Opening, prompt_length=3, sampling=SamplingParams(), prediction=predicted)
    begun = texts_of([opening(text=PROMPT)], S)
    grown = jax.tree.map(jnp.asarray, begun).longer(array([0]), array([3]), array([answer]), array([4]))
    jax.tree.map(np.testing.assert_array_equal, grown, texts_of([opening(text=PROMPT + answer)], S))


@pytest.mark.parametrize(
    ("drafts", "count", "agreed", "accepted"),
    [
        ([5, 6, 7, 8], 4, 4, 4),  # all right: the fourth tells that a wider step would have brought more
        ([5, 6, 7, 0], 4, 3, 4),
        ([5, 6, 0, 8], 4, 2, 3),
        ([5, 0, 7, 8], 4, 1, 2),
        ([0, 6, 7, 8], 4, 0, 1),
        ([5, 6, 7, 8], 2, 2, 3),  # what is no draft is not right by chance
        ([5, 6, 7, 8], 0, 0, 1),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_is_wrong(drafts, count, agreed, accepted):
    token_NW, count_N = array([drafts] * 4), array([count] * 4)
    told = accept(array([[5, 6, 7, 8]] * 4), Drafts(token_NW, count_N), array([9, 2, 1, 0]))
    assert told.agreed_N.tolist() == [agreed] * 4
    assert told.count_N.tolist() == [accepted, min(2, accepted), 1, 0]


@pytest.mark.parametrize(("draft", "count", "agreed"), [(5, 1, 1), (6, 1, 0), (5, 0, 0)])
def test_a_step_of_one_token_tells_whether_a_draft_would_have_been_right(draft, count, agreed):
    told = accept(array([[5]]), Drafts(array([[draft]]), array([count])), array([9]))
    assert (told.agreed_N.tolist(), told.count_N.tolist()) == ([agreed], [1])
