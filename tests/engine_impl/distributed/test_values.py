"""What an engine's verbs are called with arrives as it was."""

from collections import deque
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from slipstream.engine_impl.api import Allowed, Opening, Piece
from slipstream.engine_impl.distributed.handles import Handle
from slipstream.engine_impl.distributed.values import RECORDS, decoded, encoded
from slipstream.engine_impl.sampling.params import SamplingParams
from slipstream.protos import hosts_pb2 as pb

SAMPLING = SamplingParams(temperature=0.7, seed=2**32 - 1, logit_bias={3: -1.5, 7: 0.25}, stop_token_ids=(5, 6))


def nothing(number: int):
    pytest.fail("no handle was sent")


def sent(value, held: Callable[[int], Any] = nothing):
    """Through the wire's bytes."""
    return decoded(pb.Value.FromString(encoded(value).SerializeToString()), held)


def equal(one, other):
    """Records of arrays have no equality of their own."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) in RECORDS.values():
        return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**40, 0.1, float("inf"), "ä\n", (), (1, 2), (1, None), ("a", (True, 2.5)), {},
        {3: 0.5}, np.zeros((0, 4), np.int32), np.arange(6, dtype=np.uint32).reshape(2, 3), np.array(7, np.int32),
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
        SAMPLING,
        Piece(token_T=np.arange(3, dtype=np.int32), start=16, page_J=np.array([4], np.int32), logprobs=0, adapter=2),
        Opening(text=(1, 2, 3), prompt_length=2, sampling=SAMPLING, allowed_W=np.array([1], np.uint32)),
        Allowed(
            row_C=np.array([0], np.int32),
            forced_CF=np.array([[7, -1]], np.int32),
            word_CW=np.array([[2**32 - 1]], np.uint32),
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_arrive_as_they_were(value):
    assert equal(sent(value), value)


def test_numbers_of_numpy_and_lists_arrive_as_pythons():
    assert sent([np.int32(3), np.float32(0.5), np.bool_(True)]) == (3, 0.5, True)
    assert sent([1, 2]) == (1, 2)


def test_a_handle_is_what_stands_behind_its_number():
    handle = Handle(7, "a state", deque())
    assert sent([handle, 1], {7: "the follower's state"}.__getitem__) == ("the follower's state", 1)


def test_what_has_no_form_is_told():
    with pytest.raises(TypeError, match="a object cannot be sent"):
        encoded(object())


def test_a_message_can_name_no_other_type():
    with pytest.raises(KeyError):
        decoded(pb.Value(record=pb.Record(type="Popen")), nothing)
    with pytest.raises(ValueError, match="no known kind"):
        decoded(pb.Value(), nothing)
