"""Whoever reads stdout and stderr, or has stopped to, holds up no writer."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from slipstream.server.observe import standard_files

from ..pipes import fill

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
WAIT_S = 30

WRITERS = """
import atexit, ctypes, os, subprocess, sys, threading, time
from slipstream.server.observe import logs, standard_files
standard_files.take_over()
logs.configure("text")
def write_in_c():
    libc = ctypes.PyDLL(None)  # which keeps the interpreter meanwhile
    for _ in range(300):
        libc.write(2, b"c" * 4096, 4096)
thread = threading.Thread(target=write_in_c)
thread.start()
thread.join()
print("p" * 1000_000, file=sys.stderr)
print("p" * 1000_000)
logs.log.error("l" * 100_000)
subprocess.run(["head", "-c", "1000000", "/dev/zero"], stdout=2, stderr=2)
subprocess.run([sys.executable, "-c", "import sys; sys.stderr.write(1000_000 * 'x')"], stdout=subprocess.DEVNULL)
atexit.register(sys.stderr.write, "e" * 1000_000)
time.sleep(0.1)  # the log's thread has begun
"""


def writers(file: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITERS], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
def test_no_writer_waits_for_a_reader_that_has_stopped(kind):
    """Neither C nor Python, nor a child, nor the interpreter's end; and the status is that of success."""
    if kind == "pipe":
        reading, writing = os.pipe()
        fill(writing)
    elif kind == "socket":
        reading, writing = (sock.detach() for sock in socket.socketpair())
    else:
        reading, writing = os.openpty()
    try:
        with writers(writing) as process:
            try:
                assert process.wait(WAIT_S) == 0
            finally:
                process.kill()
    finally:
        os.close(reading)
        os.close(writing)


def test_others_who_hold_the_pipe_still_wait_for_its_reader():
    """A shell's next command may not know that a write can fail for want of room."""
    reading, writing = os.pipe()
    with open(reading, "rb") as reader:
        with writers(writing) as process:
            assert os.get_blocking(writing)
            os.close(writing)
            text = reader.read()
        assert process.returncode == 0
    assert b"l" * 1000 in text


def test_a_file_takes_everything(tmp_path):
    code = "from slipstream.server.observe import standard_files as f; f.take_over(); import sys; "
    code += "print('o' * 1000_000); print('e' * 1000_000, file=sys.stderr)"
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=err, check=True)
    assert (tmp_path / "out").read_text() == "o" * 1000_000 + "\n"
    assert (tmp_path / "err").read_text() == "e" * 1000_000 + "\n"


def test_a_stream_in_the_place_of_stderr_stays_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", None)
    monkeypatch.setattr("threading.excepthook", None)
    monkeypatch.setattr("logging.captureWarnings", lambda _: None)
    standard_files.take_over()
    print("here", file=sys.stderr)
    assert capsys.readouterr().err == "here\n"


def test_what_python_tells_goes_into_the_log():
    """Warnings, and exceptions in threads and finalisers: each a record, and serving does not wait for a reader."""
    code = """
import threading, warnings
from slipstream.server.observe import logs, standard_files
class Bad:
    def __del__(self):
        raise ValueError("in a finaliser")
def fail():
    raise ValueError("in a thread")
standard_files.take_over()
logs.configure("json")
warnings.warn("a warning")
Bad()
thread = threading.Thread(target=fail)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert ["a warning" in records[0]["message"], *("in a " in record["exception"] for record in records[1:])] == [
        True
    ] * 3
