"""JetStream's own Driver, orchestrator and gRPC server on our engine, asked through its own stubs."""

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import grpc
import jax
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jetstream.core.proto import jetstream_pb2 as pb
from jetstream.core.proto.jetstream_pb2_grpc import OrchestratorStub
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.server import jetstream_host, offline
from slipstream.server.options import AnswerOptions

from tests.engine_impl.text_models import byte_tokenizer, text_engine

pytestmark = pytest.mark.slow

PROMPTS = ["Hi", "What is the capital of France?", "Say 😀 again.", "1 2 3", "x"]
MAX_TOKENS = 12
WAIT_S = 60


@contextmanager
def serving(*flags):
    """(process, channel) of tests/server/jetstream_process.py."""
    command = [sys.executable, "-W", "error", "-m", "tests.server.jetstream_process", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("SERVING on 127.0.0.1:"), process.stderr.read()
        with grpc.insecure_channel(line.split()[-1]) as channel:
            yield process, channel
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def interleaved():
    with serving("1", "--slots", "2", "--max-queued", "2") as started:
        yield started


def call(channel, prompt, max_tokens=MAX_TOKENS, **fields):
    content = (
        {"text_content": pb.DecodeRequest.TextContent(text=prompt)}
        if isinstance(prompt, str)
        else {"token_content": pb.DecodeRequest.TokenContent(token_ids=prompt)}
    )
    request = pb.DecodeRequest(max_tokens=max_tokens, **content, **fields)
    return OrchestratorStub(channel).Decode(request, timeout=WAIT_S)


def answer(replies):
    samples = [sample for reply in replies for sample in reply.stream_content.samples]
    return [token_id for sample in samples for token_id in sample.token_ids]


def in_parallel(function, arguments):
    """Its results, by argument."""
    results = {}
    threads = [threading.Thread(target=lambda a=a: results.update({a: function(a)})) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return results


@pytest.fixture(scope="module")
def expected():
    """The same prompts through our orchestrator, offline."""
    tokenizer = byte_tokenizer()
    engine, params = text_engine(jax.devices()[:1], tokenizer, slots=2)
    options = AnswerOptions(max_tokens=MAX_TOKENS)
    *_, answers = offline.answer(engine, params, [tokenizer.encode(prompt) for prompt in PROMPTS], options)
    return {prompt: answer.token_ids for prompt, answer in zip(PROMPTS, answers, strict=True)}


def test_theirs_and_ours_answer_alike_text_and_token_ids(interleaved, expected):
    """One at a time, since this server lets only two wait."""
    _, channel = interleaved
    assert {prompt: answer(call(channel, prompt)) for prompt in PROMPTS} == expected
    for prompt in PROMPTS:
        ids = byte_tokenizer().encode(prompt)
        assert answer(call(channel, ids)) == expected[prompt]
        assert answer(call(channel, ids, session_cache="a", priority=1)) == expected[prompt]


def test_requests_that_cannot_be_answered_end_and_harm_nobody(interleaved, expected):
    _, channel = interleaved
    good = call(channel, "Hi")
    for bad in ("", [], [5, 260], [-1]):
        assert answer(call(channel, bad)) == []
    with pytest.raises(grpc.RpcError):
        list(OrchestratorStub(channel).Decode(pb.DecodeRequest(max_tokens=3), timeout=WAIT_S))
    assert answer(good) == expected["Hi"]


def test_both_health_checks(interleaved):
    _, channel = interleaved
    assert OrchestratorStub(channel).HealthCheck(pb.HealthCheckRequest(), timeout=WAIT_S).is_live
    for service in ("", "jetstream_proto.Orchestrator"):
        request = health_pb2.HealthCheckRequest(service=service)
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_queue_has_a_bound(interleaved):
    """Two decode, three are on their way to a slot, two wait: of twenty some must be told so."""
    _, channel = interleaved

    def code(index):
        try:
            return len(answer(call(channel, "Hi", 60)))
        except grpc.RpcError as error:
            return error.code()

    codes = list(in_parallel(code, range(20)).values())
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes
    assert set(codes) == {60, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_sigterm_lets_answers_finish_and_ends_with_0(interleaved):
    """Last: it stops the module's server. The logs are ours alone, and nothing but the address is on stdout."""
    process, channel = interleaved
    running = call(channel, "Hi", 60)
    first = next(running)
    process.send_signal(signal.SIGTERM)
    assert len(answer([first, *running])) == 60
    assert process.wait(WAIT_S) == 0
    assert process.stdout.read() == ""
    assert "Generate engine" not in process.stderr.read()


def test_disaggregated(expected):
    """Prefill on two devices, decode on two others; all prompts at once."""
    with serving("4", "--slots", "2", "--disaggregated") as (process, channel):
        assert in_parallel(lambda prompt: answer(call(channel, prompt)), PROMPTS) == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def test_a_single_device_has_no_halves():
    with pytest.raises(RefusedError, match="there are 1; it needs an even number"):
        jetstream_host.engines_config(EngineConfig(), jax.devices()[:1], disaggregated=True)
