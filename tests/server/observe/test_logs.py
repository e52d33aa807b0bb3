"""What the log says, and what it must not."""

import contextlib
import io
import json
import logging
import os
import sys
import time

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.observe import logs
from slipstream.server.observe.metrics import Metrics, Outcome
from slipstream.server.observe.status import StatusLine

from tests.fakes import FakeEngine
from tests.serving import serving_in_thread

log = logging.getLogger("slipstream.server.test")
TIMES = {"queue_s": 0.001, "ttft_s": None, "tpot_s": None, "e2e_s": 0.5}


@pytest.fixture
def configured(monkeypatch):
    """configure(...), undone after the test."""
    root, names = logging.getLogger(), ("slipstream", logs.PROMPTS.name)
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    monkeypatch.setattr(root, "handlers", [])  # pytest's own are not to be closed

    def configure(*args, **kwargs):
        logs.configure(*args, **kwargs)

    yield configure
    root.handlers = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def lines(capsys) -> list[str]:
    for handler in logging.getLogger().handlers:
        handler.flush()
    return capsys.readouterr().err.splitlines()


def test_json_lines(configured, capsys):
    configured("json")
    log.info("ready after %.1f s", 1.5)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, lines(capsys))
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "info", "logger": "slipstream.server.test", "message": "ready after 1.5 s"}
    assert "ValueError: broken" in second["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_requests_end_is_one_line(form, configured, capsys):
    configured(form)
    Metrics().ended(Outcome.DEADLINE, prompt_tokens=5, cached_tokens=2, generated_tokens=2, request_id="abc", **TIMES)
    (line,) = lines(capsys)
    if form == "text":
        assert line.endswith(
            "I request ended request_id=abc outcome=deadline prompt_tokens=5 cached_tokens=2 generated_tokens=2 "
            "queue_ms=1.0 total_ms=500.0"
        )
    else:
        facts = json.loads(line)
        assert (facts["request_id"], facts["outcome"], facts["ttft_ms"]) == ("abc", "deadline", None)


def test_a_message_with_line_ends_is_one_json_line(configured, capsys):
    configured("json")
    log.info("two\nlines %s", "é\u2028")
    (line,) = lines(capsys)
    assert json.loads(line)["message"] == "two\nlines é\u2028"


def test_others_are_heard_from_warnings_up(configured, capsys):
    configured("text")
    logging.getLogger("jax").info("chatter")
    logging.getLogger("jax").warning("trouble")
    log.debug("detail")
    (line,) = lines(capsys)
    assert "trouble" in line


@pytest.mark.parametrize("prompts", [False, True])
def test_prompts_are_logged_only_if_asked_for(prompts, configured, capsys):
    configured("json", prompts=prompts)
    text = pb.DecodeRequest.TextContent(text="a secret")
    with serving_in_thread(FakeEngine()) as target, grpc.insecure_channel(target) as channel:
        request = pb.DecodeRequest(text_content=text, max_tokens=2)
        list(OrchestratorStub(channel).Decode(request, timeout=10, metadata=[("x-request-id", "mine")]))
    written = [json.loads(line) for line in lines(capsys)]
    (end,) = [line for line in written if line["message"] == "request ended"]
    assert (end["request_id"], end["generated_tokens"]) == ("mine", 2)
    asked = [(line["request_id"], line["prompt"]) for line in written if line["message"] == "request asks"]
    assert asked == ([("mine", "a secret")] if prompts else [])


def test_a_text_field_cannot_forge_another_line_or_field(configured, capsys):
    """Request ids and prompts are what strangers send."""
    configured("text")
    log.info("request asks", extra={"fields": {"request_id": "x outcome=ok", "prompt": "two\nlines", "n": 3}})
    (line,) = lines(capsys)
    assert line.endswith("request asks request_id='x outcome=ok' prompt='two\\nlines' n=3")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_record_stands_above_the_status_line(configured, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = StatusLine()
    configured("text", line=line)
    line.show("slots 1/8")
    log.info("news")
    logging.getLogger().handlers[0].flush()
    wiped, after = terminal.getvalue().split("slots 1/8")
    assert wiped == "\r\x1b[K"
    assert after.startswith("\r\x1b[K")
    assert after.endswith(" I news\n")


def test_a_log_that_nobody_reads_holds_up_nobody(configured, monkeypatch):
    """A pipe holds 64 KiB; what comes then waits, and what finds no place is counted."""
    monkeypatch.setattr(logs, "WAITING", 10)
    monkeypatch.setattr(logs, "FLUSH_S", 0.1)
    reading, writing = os.pipe()
    with open(reading, errors="replace") as reader, open(writing, "w") as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        configured("text")
        (handler,) = logging.getLogger().handlers
        begin = time.monotonic()
        for number in range(2000):
            log.info("line %d %s", number, "x" * 1000)
        handler.flush()
        assert time.monotonic() - begin < 5
        assert isinstance(handler, logs.Handler)
        told = 0
        while told < handler.dropped:  # now somebody reads
            text = reader.readline()
            told += int(text.split()[0]) if "lines of the log were dropped" in text else 0
        assert told == handler.dropped


def test_a_log_whose_reader_has_gone_is_no_error(configured, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1) as writer:
        monkeypatch.setattr(sys, "stderr", writer)
        configured("text")
        log.info("to nobody")
        logging.getLogger().handlers[0].flush()
        monkeypatch.setattr(sys, "stderr", None)
        configured("text", line=StatusLine())
        log.info("to nobody")
        logging.getLogger().handlers[0].flush()
        with contextlib.suppress(BrokenPipeError):
            writer.close()
