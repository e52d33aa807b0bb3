"""JetStream's own Driver, orchestrator and gRPC server on our engine, asked through its own stubs."""

import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager
from typing import Any, cast

import grpc
import jax
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jetstream.core.proto import jetstream_pb2
from jetstream.core.proto.jetstream_pb2_grpc import OrchestratorStub
from slipstream.cli import main as cli
from slipstream.cli import offline
from slipstream.engine_impl.config import EngineConfig
from slipstream.engine_impl.errors import RefusedError
from slipstream.server.jetstream import host as jetstream_host
from slipstream.server.request.options import AnswerOptions

from tests.engine_impl.text_models import one_device_engine
from tests.engine_impl.tiny_models import embedded_engine

pb = cast(Any, jetstream_pb2)
"""Its classes are made when it is imported."""

pytestmark = pytest.mark.slow

CLI = [sys.executable, "-m", "slipstream.cli.main", "serve", "--orchestrator", "jetstream", "--port", "0"]
SIZES = ["--slots", "3", "--cache-length", "256", "--max-prefill-length", "64", "--tensor-parallel", "1"]
TINY = [sys.executable, "-W", "error", "-m", "tests.server.jetstream.jetstream_process"]
PROMPTS = ["The capital of France is", "🙂 🙂 🙂 🙂 🙂 🙂", "def fibonacci(n):", "1, 2, 3, 5, 8,", "Wie heißt du?"]
SHORT_PROMPTS = ["Hi", "1 2 3", "😀"]
MAX_TOKENS = 12
WAIT_S = 60


@contextmanager
def running(command):
    """(process, address) of a server."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("SERVING on 127.0.0.1:"), process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def interleaved():
    """The embedded model as the command line serves it."""
    with running([*CLI, *SIZES, "--max-queued", "5"]) as (process, address), grpc.insecure_channel(address) as channel:
        yield process, channel


def call(channel, prompt, max_tokens=MAX_TOKENS, **fields):
    content = (
        {"text_content": pb.DecodeRequest.TextContent(text=prompt)}
        if isinstance(prompt, str)
        else {"token_content": pb.DecodeRequest.TokenContent(token_ids=prompt)}
    )
    request = pb.DecodeRequest(max_tokens=max_tokens, **content, **fields)
    return OrchestratorStub(channel).Decode(request, timeout=WAIT_S)


def answer(replies):
    """(text, token ids)"""
    samples = [sample for reply in replies for sample in reply.stream_content.samples]
    return "".join(sample.text for sample in samples), [token_id for sample in samples for token_id in sample.token_ids]


def in_parallel(function, arguments):
    """Its results, by argument."""
    results = {}
    threads = [threading.Thread(target=lambda a=a: results.update({a: function(a)})) for a in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return results


def through_our_orchestrator(engine, params, prompts):
    """(text, token ids) by prompt, offline."""
    encode = engine.get_tokenizer().encode
    options = AnswerOptions(max_tokens=MAX_TOKENS)
    *_, answers = offline.answer(engine, params, [encode(prompt) for prompt in prompts], options)
    samples = [answer.samples[0] for answer in answers]
    return {prompt: (sample.text, list(sample.token_ids)) for prompt, sample in zip(prompts, samples, strict=True)}


@pytest.fixture(scope="module")
def expected():
    return through_our_orchestrator(*embedded_engine(), PROMPTS)


def test_theirs_and_ours_answer_alike_text_and_token_ids(interleaved, expected):
    _, channel = interleaved
    assert in_parallel(lambda prompt: answer(call(channel, prompt)), PROMPTS) == expected
    assert "🙂" in expected[PROMPTS[1]][0]  # a character of several tokens, which came out whole
    for prompt in PROMPTS[:2]:
        ids = embedded_engine()[0].get_tokenizer().encode(prompt)
        assert answer(call(channel, ids)) == ("", expected[prompt][1])  # ids for ids: JetStream sends no text then
        assert answer(call(channel, ids, session_cache="a", priority=1)) == ("", expected[prompt][1])


def test_requests_that_cannot_be_answered_end_and_harm_nobody(interleaved, expected):
    _, channel = interleaved
    good = call(channel, PROMPTS[0])
    for bad in ("", [], [5, 49152], [-1]):
        assert answer(call(channel, bad)) == ("", [])
    with pytest.raises(grpc.RpcError):
        list(OrchestratorStub(channel).Decode(pb.DecodeRequest(max_tokens=3), timeout=WAIT_S))
    assert answer(good) == expected[PROMPTS[0]]


def test_both_health_checks(interleaved):
    _, channel = interleaved
    assert OrchestratorStub(channel).HealthCheck(pb.HealthCheckRequest(), timeout=WAIT_S).is_live
    for service in ("", "jetstream_proto.Orchestrator"):
        request = health_pb2.HealthCheckRequest(service=service)
        stub = cast(Any, health_pb2_grpc.HealthStub(channel))  # its stubs name no method
        reply = stub.Check(request, timeout=WAIT_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_queue_has_a_bound(interleaved):
    """Three decode, three are on their way to a slot, five wait: of twenty some must be told so."""
    _, channel = interleaved

    def code(index):
        try:
            return len(answer(call(channel, PROMPTS[0], 6))[1])
        except grpc.RpcError as error:
            return error.code()

    codes = list(in_parallel(code, range(20)).values())
    assert set(codes) == {6, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert 6 <= codes.count(6) < 20


def test_sigterm_lets_answers_finish_and_ends_with_0(interleaved):
    """Last: it stops the module's server. The logs are ours alone, and nothing but the address is on stdout."""
    process, channel = interleaved
    calls = call(channel, PROMPTS[0], 20)
    first = next(calls)
    process.send_signal(signal.SIGTERM)
    assert len(answer([first, *calls])[1]) == 20
    assert process.wait(WAIT_S) == 0
    assert process.stdout.read() == ""
    log = process.stderr.read()
    assert "Generate engine" not in log
    assert "Traceback" not in log.replace('Traceback (most recent call last):\n  File "src/python/grpcio', "")


def test_disaggregated_over_tls_with_metrics(tmp_path):
    """Prefill on two devices, decode on two others; all prompts at once."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    tls = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    metrics_port = str(jetstream_host.free_port("127.0.0.1"))
    trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with (
        running([*TINY, "4", "--slots", "2", "--prefill-devices", "2", "--metrics-port", metrics_port, *tls]) as (
            process,
            address,
        ),
        grpc.secure_channel(address, trusted) as channel,
    ):
        answers = in_parallel(lambda prompt: answer(call(channel, prompt))[1], SHORT_PROMPTS)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=WAIT_S) as page:
            assert b"jetstream_slots_available_percentage" in page.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/readyz", timeout=WAIT_S) as page:
            assert page.status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    alone = through_our_orchestrator(*one_device_engine(), SHORT_PROMPTS)
    assert answers == {prompt: token_ids for prompt, (_, token_ids) in alone.items()}


@pytest.mark.parametrize(("devices", "of_prefill"), [(1, 1), (4, 4), (4, 5)])
def test_both_sides_need_a_device(devices, of_prefill):
    with pytest.raises(RefusedError, match=f"^prefill_devices={of_prefill}: there are {devices} devices, and both"):
        jetstream_host.engines_config(EngineConfig(), jax.devices()[:devices], of_prefill)


@pytest.mark.parametrize(
    "words",
    [
        *(
            [flag, "7"]
            for flag in (
                "--auth-token-file", "--max-streams-per-client", "--max-queued-tokens", "--profile", "--http-port",
                "--admin-token-file", "--served-model-name",
            )
        ),
        ["--otlp-endpoint", "http://127.0.0.1:4317"],
        ["--tool-format", "hermes"],
        ["--reasoning-format", "none"],
        ["--allow-origin", "https://ui.example"],
        ["--no-prefix-cache"],
        ["--no-isolate-prefixes"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_jetstreams_server_cannot_do_is_refused(words, capsys):
    assert cli.run(["serve", "--orchestrator", "jetstream", *words]) == cli.BAD_INPUT
    assert f"{words[0]}: not with JetStream's server" in capsys.readouterr().err
