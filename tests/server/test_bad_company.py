"""A serving process whose log nobody reads, whose stdout is closed, that gets strange signals, or has no file left."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from slipstream.server.net.connections import most_connections
from slipstream.server.net.ports import listening

from tests.server.calls import WAIT_S
from tests.server.pipes import fill

pytestmark = pytest.mark.slow

SERVER = """
import asyncio, sys
from slipstream.server.observe import logs, standard_files
from slipstream.server.config import ServerConfig
from slipstream.server.serve import serve
from slipstream.cli.main import open_standard_files
from tests.fakes import FakeEngine
open_standard_files()
standard_files.take_over()
logs.configure("text")
load = lambda: (FakeEngine(model_name="m" * 2000), None)
sys.exit(asyncio.run(serve(load, ServerConfig(port=0, http_port=int(sys.argv[1]), grace_s=5))))
"""
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Python's own buffers belong to the bad company: a lock of theirs is held by whoever writes."""


def start(port: int, *, shell: str = "exec {}", **more) -> subprocess.Popen[str]:
    """The command runs in a shell that may close its files first."""
    quoted = f"'{sys.executable}' -c '{SERVER}' {port}"
    return subprocess.Popen(["bash", "-c", shell.format(quoted)], cwd=ROOT, env=ENVIRONMENT, text=True, **more)


@pytest.fixture
def port() -> int:
    with listening("127.0.0.1", 0, what="HTTP", flag="--http-port")[0] as sock:
        return sock.getsockname()[1]


def get(port: int, path: str = "/health") -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=WAIT_S) as answer:
            return answer.status
    except OSError:
        return 0


def ask(port: int) -> str:
    body = json.dumps({"prompt": "a", "max_tokens": 3}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        return json.load(answer)["choices"][0]["text"]


def await_ready(port: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 6 * WAIT_S
    while get(port) != 200:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def await_gone(port: int) -> None:
    """A shell may end before the server that it started."""
    deadline = time.monotonic() + 6 * WAIT_S
    while get(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(2 * WAIT_S)
    finally:
        process.kill()


def test_a_log_that_nobody_reads_stops_neither_answers_nor_the_end(port):
    """A pipe takes 64 KiB, each answer is a line of 100 bytes."""
    reading, writing = os.pipe()
    with start(port, stdout=subprocess.DEVNULL, stderr=writing) as process:
        await_ready(port, process)
        fill(writing)
        for _ in range(50):
            assert ask(port) == "bcd"
        assert end(process) == 0
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "shell", ["exec {} | head -c 0", "exec {} >&-", "exec {} >&- 2>&- <&-", "exec {} 2>&1 | true"], ids=str
)
def test_it_serves_whoever_holds_its_files(shell, port):
    with start(
        port, shell=shell, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        await_ready(port, process)
        assert ask(port) == "bcd"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(2 * WAIT_S)
        await_gone(port)


def test_signals_that_mean_nothing_are_told_and_end_nothing(port):
    with start(port, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        await_ready(port, process)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            process.send_signal(number)
        assert ask(port) == "bcd"
        assert end(process) == 0
        log = process.stderr.read()
    assert "SIGUSR1: serve with --profile" in log
    assert "SIGUSR2: means nothing here" in log
    assert "SIGHUP: certificates and tokens are read again" in log


def test_connections_that_ask_for_nothing_give_way(port):
    """Of 200 file descriptors the server keeps half for itself; more than that many wait in silence."""
    limit = "ulimit -n 200; exec {}"
    with start(port, shell=limit, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        await_ready(port, process)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        for _ in range(5):
            assert ask(port) == "bcd"
        for sock in idle:
            sock.close()
        assert end(process) == 0
        log = process.stderr.read()
    assert len(log) < 20_000
    assert "Traceback" not in log


def test_the_bound_on_connections_follows_the_limit_on_files(monkeypatch):
    for soft, most in ((32, 8), (256, 64), (1024, 448), (resource.RLIM_INFINITY, 32768), (1 << 20, 32768)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_connections() == most
