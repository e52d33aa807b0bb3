"""Real signals, to a server in a process of its own."""

import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from tests.server.calls import WAIT_S

SERVER = """
import asyncio, sys, threading
from slipstream.server.config import ServerConfig
from slipstream.server.serve import serve
from tests.fakes import FakeEngine
engine = FakeEngine(step_s=0.02)
if sys.argv[1] == "broken":
    engine.on_generate = lambda step: 1 / 0
def load():
    if sys.argv[1] == "never":
        print("loading", flush=True)
        threading.Event().wait()
    return engine, None
sys.exit(asyncio.run(serve(load, ServerConfig(port=0, grace_s=30))))
"""


def address_of(process: subprocess.Popen[str]) -> str:
    """host:port, when it serves."""
    assert process.stdout is not None
    return process.stdout.readline().removeprefix("SERVING on ").strip()


def errors_of(process: subprocess.Popen[str]) -> str:
    """All that it wrote to stderr."""
    assert process.stderr is not None
    return process.stderr.read()


def start(mode):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", SERVER, mode]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(number):
    with start("serve") as process:
        address = address_of(process)
        with grpc.insecure_channel(address) as channel:
            request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[64]), max_tokens=10)
            call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S)
            text = next(call).stream_content.samples[0].text
            process.send_signal(number)
            text += "".join(reply.stream_content.samples[0].text for reply in call)
        assert text == "ABCDEFGHIJ"
        assert process.wait(WAIT_S) == 0
        assert errors_of(process) == ""


def test_a_second_signal_forces():
    with start("serve") as process:
        address = address_of(process)
        with grpc.insecure_channel(address) as channel:
            request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[130]), max_tokens=250)
            call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S)
            next(call)
            process.send_signal(signal.SIGTERM)
            next(call)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(WAIT_S) == 0


def test_a_dead_engine_ends_the_process_with_the_reason():
    with start("broken") as process:
        address = address_of(process)
        request = pb.DecodeRequest(token_content=pb.DecodeRequest.TokenContent(token_ids=[64]), max_tokens=10)
        with grpc.insecure_channel(address) as channel:
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    list(OrchestratorStub(channel).Decode(request, timeout=WAIT_S))
        assert process.wait(WAIT_S) == 1
        assert "the engine is given up: DeadError: 3 failures in a row" in errors_of(process)


def test_a_signal_during_the_load_ends_it():
    with start("never") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.terminate()
        assert process.wait(WAIT_S) == 0
