"""Requests to an orchestrator over a fake engine."""

import queue
import time
from contextlib import contextmanager

from slipstream.server.request.request import Request
from slipstream.server.scheduler.orchestrator import Orchestrator

WAIT_S = 30


class Asked(Request):
    """A request whose events can be waited for."""

    def __init__(self, text: str, max_tokens: int = 3, **more) -> None:
        self.events = queue.Queue()
        super().__init__(prompt_ids=list(text.encode()), max_tokens=max_tokens, deliver=self.events.put, **more)

    def next(self):
        return self.events.get(timeout=WAIT_S)

    def answer(self):
        """(text, last event)."""
        events = self.all()
        return "".join(event.text for event in events), events[-1]

    def all(self):
        """What has not been read yet, to the last event; and nothing comes after it."""
        events = [self.next()]
        while not events[-1].is_last:
            events.append(self.next())
        assert self.events.empty()
        return events


def texts(events):
    """By sample."""
    found = {}
    for event in events:
        found[event.index] = found.get(event.index, "") + event.text
    return found


@contextmanager
def running(engine, **more):
    orchestrator = Orchestrator(engine, None, **{"max_queued": 10, "warm_up": False} | more)
    orchestrator.start()
    try:
        yield orchestrator
    finally:
        orchestrator.close()


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def ask(orchestrator, *args, **more):
    request = Asked(*args, **more)
    orchestrator.submit(request)
    return request


def raise_on(*steps):
    def on_generate(step):
        if step in steps:
            raise RuntimeError(f"step {step} broke\nand more lines")

    return on_generate
