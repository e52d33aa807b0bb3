"""Prompts answered in this process, through the same orchestrator as the server's."""

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .options import AnswerOptions
from .orchestrator import Orchestrator
from .request import Event, Limits, Request

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine
    from ..engine_impl.tokenizer import TextStream


@dataclass(kw_only=True)
class Answer:
    """One prompt's answer, growing; finish_reason is set when it is whole."""

    prompt_token_ids: Sequence[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    ttft_ms: float | None = None
    """Until its first token, the wait for a slot and any compilation included (ms)."""
    total_ms: float | None = None


@contextmanager
def running(engine: "Engine", params: Any, *, max_queued: int) -> Iterator[Orchestrator]:
    """An orchestrator for the block. It compiles only what its requests need."""
    orchestrator = Orchestrator(engine, params, max_queued=max_queued, warm_up=False)
    orchestrator.start()
    try:
        yield orchestrator
    finally:
        orchestrator.close()


def answer(
    engine: "Engine", params: Any, prompts: Sequence[Sequence[int]], options: AnswerOptions
) -> Iterator[list[Answer]]:
    """Yields all answers, in the order of the prompts (token ids), whenever one has grown.

    Raises RefusedError before anything is run, or the error that a request ended with.
    """
    limits = Limits.of(engine)
    for prompt_ids in prompts:
        limits.check(prompt_ids, options.max_tokens)
    answers = [Answer(prompt_token_ids=prompt_ids) for prompt_ids in prompts]
    texts = [engine.get_tokenizer().stream() for _ in prompts]
    events: queue.SimpleQueue[tuple[int, Event, float]] = queue.SimpleQueue()
    start = time.perf_counter()
    with running(engine, params, max_queued=len(prompts)) as orchestrator:
        for index in range(len(prompts)):
            orchestrator.submit(request(index, answers[index], options, events))
        while any(answer.finish_reason is None for answer in answers):
            index, event, now = events.get()
            grow(answers[index], event, texts[index], round((now - start) * 1000, 3))
            yield answers


def request(index: int, answer: Answer, options: AnswerOptions, events: queue.SimpleQueue) -> Request:
    """Its events go to `events` with its index and their time (s)."""
    return Request(
        prompt_ids=answer.prompt_token_ids,
        max_tokens=options.max_tokens,
        sampling=options.sampling(),
        deliver=lambda event: events.put((index, event, time.perf_counter())),
    )


def grow(answer: Answer, event: Event, text: "TextStream", ms: float) -> None:
    """Adds what `event` brought, `ms` after the start. Raises the error that the request ended with."""
    if event.error is not None:
        raise event.error
    if answer.ttft_ms is None:
        answer.ttft_ms = ms
    answer.token_ids += event.token_ids
    answer.text += "".join(text.feed(token_id) for token_id in event.token_ids)
    if event.finish_reason is not None:
        answer.text += text.finish()
        answer.finish_reason, answer.total_ms = event.finish_reason.value, ms
