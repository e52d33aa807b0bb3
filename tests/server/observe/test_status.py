"""The line on a terminal."""

import asyncio
import io
import re

import pytest
from slipstream.server.config import ServerConfig
from slipstream.server.lifecycle import Serving
from slipstream.server.observe import status
from slipstream.server.observe.metrics import Metrics, Outcome
from slipstream.server.observe.status import Status, StatusLine

from tests.fakes import FakeEngine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def metrics():
    metrics = Metrics()
    metrics.watch(queue_depth=lambda: 7, slots_in_use=lambda: 3, slots=8, pages=dict)
    return metrics


def test_what_it_says(metrics, monkeypatch):
    now = 100.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    line = Status(metrics)
    assert line.text() == "slots 3/8 · queue 7 · 0 tokens/s · TTFT p50 - · rejected 0"
    now = 102.0
    for _ in range(20):
        metrics.step(0.05, slots=3)
    metrics.rejected()
    for ttft_s in (0.1, 0.3, 9.0):
        metrics.ended(
            Outcome.OK,
            prompt_tokens=1,
            cached_tokens=0,
            generated_tokens=1,
            queue_s=0.0,
            ttft_s=ttft_s,
            tpot_s=None,
            e2e_s=9.0,
        )
    assert line.text() == "slots 3/8 · queue 7 · 30 tokens/s · TTFT p50 300 ms · rejected 1"
    now = 104.0
    assert "· 0 tokens/s ·" in line.text()


def test_it_is_silent_on_no_terminal():
    stream = io.StringIO()
    line = StatusLine(stream)
    line.show("text")
    line.clear()
    assert stream.getvalue() == ""


def test_it_writes_over_itself_and_leaves_nothing(metrics, monkeypatch):
    monkeypatch.setattr(status, "EVERY_S", 0.001)
    terminal = Terminal()

    async def scenario():
        task = asyncio.create_task(Status(metrics).run(StatusLine(terminal)))
        while terminal.getvalue().count("slots") < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    *shown, last = re.split(r"\r\x1b\[K", terminal.getvalue())[1:]
    assert all(text.startswith("slots 3/8") for text in shown)
    assert last == ""
    assert "\n" not in terminal.getvalue()


def test_a_serving_server_shows_it_and_wipes_it_at_the_end(monkeypatch):
    monkeypatch.setattr(status, "EVERY_S", 0.005)
    terminal = Terminal()

    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=3)
        async with Serving(lambda: (engine, None), ServerConfig(port=0), StatusLine(terminal)):
            while "slots 0/3 · queue 0 · 0 tokens/s" not in terminal.getvalue():
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scenario(), 10))
    assert terminal.getvalue().endswith("\r\x1b[K")
