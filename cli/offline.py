"""Prompts answered in this process, through the same orchestrator as the server's."""

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..server.request.adapter import LoadedAdapter
from ..server.request.answer import Answer
from ..server.request.control_stops import with_control_stops
from ..server.request.events import Event
from ..server.request.grammar import Grammar
from ..server.request.limits import Limits
from ..server.request.options import AnswerOptions
from ..server.request.prefix_key import prefix_key
from ..server.request.request import Request
from ..server.scheduler.orchestrator import Orchestrator

if TYPE_CHECKING:
    from ..engine_impl.engine import Engine


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
    engine: "Engine",
    params: Any,
    prompts: Sequence[Sequence[int]],
    options: AnswerOptions,
    grammar: Grammar | None = None,
    adapter: str | None = None,
) -> Iterator[list[Answer]]:
    """Yields all answers, in the order of the prompts (token ids), whenever one has grown. `adapter` (a folder or a hub
    id) changes the model; the engine has a place for it.

    Raises RefusedError before anything is run, or the error that a request ended with.
    """
    answers = [Answer.of(options.num_samples) for _ in prompts]
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    options, limits = with_control_stops(options, engine.get_tokenizer()), Limits.of(engine)
    requests = [request(index, prompt_ids, options, events) for index, prompt_ids in enumerate(prompts)]
    if adapter is not None:
        loaded = LoadedAdapter("adapter", adapter, engine.read_adapter(adapter))
        for each in requests:
            each.adapt(loaded)
    prediction_ids = limits.ids_of_prediction(engine.get_tokenizer(), options.prediction)
    for each in requests:
        each.grammar, each.prediction_ids = grammar, prediction_ids
        limits.check(each)
        each.constrain(engine.get_tokenizer())
    with running(engine, params, max_queued=len(prompts)) as orchestrator:
        for each in requests:
            orchestrator.submit(each)
        while any(answer.usage is None for answer in answers):
            index, event = events.get()
            answers[index].grow(event)
            yield answers


def request(index: int, prompt_ids: Sequence[int], options: AnswerOptions, events: queue.SimpleQueue) -> Request:
    """Its events go to `events` with its index."""
    return Request(
        prompt_ids=prompt_ids,
        deliver=lambda event: events.put((index, event)),
        prefix_key=prefix_key(options.cache_salt),
        **options.fields(),
    )
