"""What the log says, and what it must not."""

import io
import json
import logging
import sys

import pytest
from slipstream.server import logs
from slipstream.server.metrics import Metrics, Outcome
from slipstream.server.status import StatusLine

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
    Metrics().ended(Outcome.DEADLINE, prompt_tokens=5, generated_tokens=2, request_id="abc", **TIMES)
    (line,) = lines(capsys)
    if form == "text":
        assert line.endswith(
            "I request ended request_id=abc outcome=deadline prompt_tokens=5 generated_tokens=2 queue_ms=1.0 "
            "total_ms=500.0"
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
    configured("text", prompts=prompts)
    logs.PROMPTS.debug("request %s asks %r", "abc", "a secret")
    assert ("a secret" in "".join(lines(capsys))) is prompts


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
    wiped, after = terminal.getvalue().split("slots 1/8")
    assert wiped == "\r\x1b[K"
    assert after.startswith("\r\x1b[K")
    assert after.endswith(" I news\n")
