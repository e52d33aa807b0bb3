"""Bytes of any kind at both ports of a serving process: it says nothing of them in its log, keeps nothing of them, and
answers everybody else."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slipstream.protos import orchestrator_pb2 as pb

from tests.server.calls import WAIT_S
from tests.server.test_bad_company import ask, await_ready, end, get, port, start

__all__ = ["port"]  # a fixture

pytestmark = pytest.mark.slow

EXAMPLES = 150
WARM = 40
"""Examples after which memory has found its size (count)."""
GROWTH_MIB = 40
ANSWER_S = 0.02
"""How long an answer is waited for (seconds)."""

BODY = b'{"prompt": "a", "max_tokens": 2, "stream": true}'
HTTP = [
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY),
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n5\r\n{\"mes\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    b"OPTIONS * HTTP/1.0\r\n\r\n",
]  # fmt: skip


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header that is not compressed."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


HEADERS = b"".join(
    literal(name, value)
    for name, value in (
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/slipstream.v1.Orchestrator/Decode"),
        (b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
    )
)  # fmt: skip
MESSAGE = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text="a"), max_tokens=2).SerializeToString()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")
GRPC = [
    PREFACE + frame(1, 4, 1, HEADERS) + frame(0, 1, 1, b"\x00" + len(MESSAGE).to_bytes(4, "big") + MESSAGE),
    PREFACE + frame(1, 4, 1, HEADERS) + frame(0, 0, 1, b"\x01\xff\xff\xff\xff" + b"\x0b" * 100),
    PREFACE + b"".join(frame(1, 4, 2 * n + 1, HEADERS) + frame(3, 0, 2 * n + 1, b"\0\0\0\x08") for n in range(20)),
    PREFACE + frame(9, 0, 1, b"x" * 100) + frame(7, 0, 0, b"\0" * 8),
]


def mutated(sound: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of them, with pieces replaced, left out, or said again; or nothing sound at all."""

    @st.composite
    def one(draw: Any) -> bytes:
        data = bytearray(draw(st.sampled_from(sound)))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(data)))
            width = draw(st.integers(0, 12))
            data[at : at + width] = draw(st.binary(max_size=12) | st.just(bytes(data[at : at + 40])))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)

    return one() | st.binary(max_size=300)


def send(number: int, data: bytes, ends: bool) -> None:
    """Whatever becomes of it."""
    with socket.create_connection(("127.0.0.1", number), timeout=WAIT_S) as sock:
        sock.settimeout(ANSWER_S)
        try:
            sock.sendall(data)
            if ends:
                sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
        except OSError:
            pass


@contextmanager
def served(port: int, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone afterwards, whatever happens."""
    with start(port, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more) as process:
        try:
            yield process
        finally:
            process.kill()


def memory_mib(process: subprocess.Popen[str]) -> float:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def files(process: subprocess.Popen[str]) -> int:
    return len(os.listdir(f"/proc/{process.pid}/fd"))


def grpc_port(process: subprocess.Popen[str]) -> int:
    """As it says itself."""
    assert process.stdout is not None
    return int(process.stdout.readline().rpartition(":")[2])


def decode(number: int) -> str:
    with grpc.insecure_channel(f"127.0.0.1:{number}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        call: Any = channel.unary_stream("/slipstream.v1.Orchestrator/Decode")
        replies = call(MESSAGE, timeout=2 * WAIT_S, wait_for_ready=True)
        return "".join(pb.DecodeResponse.FromString(reply).stream_content.samples[0].text for reply in replies)


@pytest.mark.parametrize(("door", "sound"), [("http", HTTP), ("grpc", GRPC)], ids=["http", "grpc"])
def test_bytes_of_any_kind(door, sound, port):
    with served(port) as process:
        assert process.stderr is not None
        of_grpc = grpc_port(process)
        await_ready(port, process)
        number = port if door == "http" else of_grpc
        seen: list[float] = []

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
        @given(mutated(sound), st.booleans())
        def attack(data, ends):
            send(number, data, ends)
            seen.append(memory_mib(process))

        attack()
        assert (get(port), ask(port), decode(of_grpc)) == (200, "bcd", "bc")
        assert files(process) < 150
        assert memory_mib(process) - seen[WARM] < GROWTH_MIB
        assert end(process) == 0
        log = process.stderr.read()
    assert "Traceback" not in log
    assert [line for line in log.splitlines() if " E " in line] == []


def test_idle_grpc_connections_leave_the_other_door_its_files(port):
    """Of 200 file descriptors; more than that many connections wait in silence, and end after 10 s."""
    with served(port, shell="ulimit -n 200; exec {}") as process:
        assert process.stderr is not None
        of_grpc = grpc_port(process)
        await_ready(port, process)
        idle = [socket.create_connection(("127.0.0.1", of_grpc)) for _ in range(300)]
        for _ in range(5):
            assert (get(port), ask(port)) == (200, "bcd")
        assert decode(of_grpc) == "bc"
        for sock in idle:
            sock.close()
        assert end(process) == 0
        log = process.stderr.read()
    assert len(log) < 20_000
    assert "Traceback" not in log
