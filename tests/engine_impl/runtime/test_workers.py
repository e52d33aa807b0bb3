"""Functions in processes of their own, and what becomes of calls that come to no end."""

import operator
import os
import pickle
import time

import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.runtime.worker import packed
from slipstream.engine_impl.runtime.workers import WorkerError, Workers
from slipstream.engine_impl.text.chat import Chat, TemplateFacts
from slipstream.engine_impl.text.chat_template import render


@pytest.fixture
def workers():
    made = Workers(1, seconds=20.0, memory_mib=64, wait_s=0.05)
    yield made
    made.close()


def test_what_a_function_returns_and_raises_comes_back(workers):
    assert workers.call(operator.add, 2, 3) == 5
    with pytest.raises(ZeroDivisionError, match="by zero"):
        workers.call(operator.truediv, 1, 0)
    with pytest.raises(RefusedError, match="refuses these messages: division by zero"):
        workers.call(render, "{{ 1 / 0 }}", (), Chat.of([]), TemplateFacts())


def test_an_exception_that_cannot_be_sent_goes_as_what_it_says():
    class Odd(Exception):
        pass

    kind, value, goes_on = pickle.loads(packed("raised", Odd("boom"), True))
    assert (kind, str(value), goes_on) == ("raised", "fails (Odd: boom)", True)
    assert isinstance(value, WorkerError)


def test_one_process_serves_call_after_call(workers):
    assert workers.call(os.getpid) == workers.call(os.getpid) != os.getpid()


def test_a_call_without_an_end_is_ended_and_the_next_one_works():
    workers = Workers(1, seconds=0.2, memory_mib=64)
    with pytest.raises(WorkerError, match=r"takes longer than 0\.2 s"):
        workers.call(time.sleep, 60)
    assert workers.call(operator.add, 2, 3) == 5
    workers.close()


def test_memory_is_bounded(workers):
    with pytest.raises(WorkerError, match="takes too much memory"):
        workers.call(operator.mul, b"x", 100 << 20)
    assert len(workers.call(operator.mul, b"x", 10 << 20)) == 10 << 20


@pytest.mark.parametrize(
    ("function", "args", "words"), [(os.abort, (), "SIGABRT"), (os._exit, (3,), "ends its process")]
)
def test_a_process_that_dies_is_told_and_replaced(workers, function, args, words):
    with pytest.raises(WorkerError, match=words):
        workers.call(function, *args)
    assert workers.call(operator.add, 2, 3) == 5


def test_a_call_waits_for_a_worker_only_so_long(workers):
    with workers._worker(), pytest.raises(WorkerError, match=r"waited 0\.05 s"):
        workers.call(operator.add, 2, 3)


def test_a_worker_ends_with_its_caller():
    workers = Workers(1, seconds=5.0, memory_mib=64)
    process = workers.call(os.getpid)
    workers.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
