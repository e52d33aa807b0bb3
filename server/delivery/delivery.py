"""Delivery: tokens become text, text becomes events, in a thread of its own, so that no step waits for a caller.

All that is done once per token in Python is done here. It is also the only place that ends a request: whoever wants one
ended posts it, and the first end counts. So every request gets exactly one last event.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine_impl.api import TextStream, Tokenizer
from ..dialects.parts import Brought
from ..dialects.syntax import AnswerReader
from ..errors import FailedError, UnavailableError
from ..observe.metrics import Metrics, Outcome
from ..request.events import Event, FinishReason, TokenLogprob, Usage
from ..request.request import Request, Sample
from .result import HostResult
from .stop_strings import StopStrings

log = logging.getLogger(__name__)

MAX_BEHIND = 4
"""Results that delivery may be behind (count). Beyond it the loop waits: no caller would see what it gained, and steps
would be wasted on answers that have met their stop string."""

CLOSE_S = 10.0
"""How long close() waits for what is still to be delivered (seconds)."""

OUTCOMES = {
    FinishReason.STOP: Outcome.OK,
    FinishReason.LENGTH: Outcome.OK,
    FinishReason.CANCELLED: Outcome.CANCELLED,
    FinishReason.DEADLINE: Outcome.DEADLINE,
}

End = FinishReason | Exception

NOTHING, NOTHING_BROUGHT = Event(), Brought()


class CallerGoneError(Exception):
    """A request's `deliver` raised."""


@dataclass(frozen=True)
class Ending:
    """A request that is over, or one of its samples."""

    request: Request
    end: End
    sample: Sample | None = None


class Text:
    """One answer's text, token by token: whole characters, cut at the first stop string, and what it holds told apart.
    What the first `min_tokens` tokens show is not searched."""

    def __init__(
        self,
        stream: TextStream,
        stop_strings: tuple[str, ...],
        min_tokens: int = 0,
        *,
        reader: AnswerReader | None = None,
    ) -> None:
        """`reader` tells apart what the text holds; None: it is all content."""
        self._stream, self._stops, self._reader = stream, StopStrings(stop_strings), reader
        self._unsearched = min_tokens  # tokens, still to come
        self.length = 0
        """Characters so far, those held back or cut off included."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that was met."""
        return self._stops.met

    @property
    def is_stopped(self) -> bool:
        return self._stops.met is not None or (self._reader is not None and self._reader.is_done)

    @property
    def has_calls(self) -> bool:
        return self._reader is not None and self._reader.has_calls

    def feed(self, token_id: int) -> Brought:
        piece = self._stream.feed(token_id)
        self.length += len(piece)
        if self._unsearched:
            self._unsearched -= 1
            return self._read(piece)
        return self._read(self._stops.feed(piece))

    def finish(self) -> Brought:
        """What is left at the answer's end."""
        left = self._stops.feed(self._stream.finish()) + self._stops.finish()
        if self._reader is None:
            return Brought(left)
        return self._reader.feed(left).and_then(self._reader.finish())

    def _read(self, text: str) -> Brought:
        return Brought(text) if self._reader is None else self._reader.feed(text)


class Delivery:
    """start() it, post from any thread, close() it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        metrics: Metrics | None,
        *,
        free: Callable[[Sample], object],
        on_end: Callable[[Request], object],
    ) -> None:
        """`free(sample)` is called, from delivery's thread, for a sample that ended here and may still have a slot;
        `on_end(request)` after a request's last event."""
        self._tokenizer, self._metrics, self._free, self._on_end = tokenizer, metrics, free, on_end
        self._posts: queue.SimpleQueue[HostResult | Ending | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # a semaphore, in C: one entry per result
        for _ in range(MAX_BEHIND):
            self._room.put(None)
        self._texts: dict[Sample, Text] = {}
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, result: HostResult) -> None:
        """Tokens for their owners. Those of a request that is done are dropped. Waits while delivery is behind."""
        self._room.get()
        self._posts.put(result)

    def end(self, request: Request, end: End) -> None:
        """Ends a request, after what was posted before. No effect on one that is done."""
        self._posts.put(Ending(request, end))

    def end_sample(self, sample: Sample) -> None:
        """Ends one whose answer is whole, likewise. No effect on one that is done."""
        self._posts.put(Ending(sample.request, FinishReason.STOP, sample))

    def close(self) -> None:
        """Returns when all that was posted before is delivered."""
        self._posts.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    # Delivery's thread, from here on.

    def _run(self) -> None:
        while (post := self._posts.get()) is not None:
            if isinstance(post, Ending):
                self._guarded(post.request, self._end, post)
            else:
                self._deliver(post)
                self._room.put(None)

    def _deliver(self, result: HostResult) -> None:
        kept, stopped = result.kept_B.tolist(), result.stopped_B.tolist()
        for slot, sample in result.roster.seats:
            if not sample.done and (kept[slot] or stopped[slot]):
                self._guarded(sample.request, self._tokens, sample, result, slot)

    def _guarded(self, request: Request, work: Callable[..., None], *arguments: Any) -> None:
        """What goes wrong with one request fails it and no other."""
        try:
            work(*arguments)
        except CallerGoneError:
            log.exception("request %s: its caller is gone", request.id)
            self._close_request(request, Outcome.CANCELLED)
        except Exception as error:
            log.exception("the delivery of request %s failed", request.id)
            failed = FailedError(f"request {request.id} failed in delivery: {type(error).__name__}: {error}")
            self._guarded(request, self._end_request, request, failed)

    def _tokens(self, sample: Sample, result: HostResult, slot: int) -> None:
        """What one step brought for a sample, as one event."""
        request, text = sample.request, self._text(sample)
        if request.first_token_at is None:
            request.first_token_at = time.monotonic()
        if result.next_logprob_T is not None:
            emit(request, Event(index=sample.index, prompt_logprobs=prompt_logprobs_of(request, result)))
        note_drafts(request, result, slot)
        kept = min(int(result.kept_B[slot]), request.max_tokens - sample.delivered)
        token_ids, starts, more = result.token_BW[slot, :kept].tolist(), list[int](), NOTHING_BROUGHT
        while len(starts) < kept and not text.is_stopped:
            token_id = token_ids[len(starts)]
            starts.append(text.length)
            brings = text.feed(token_id)
            more = more.and_then(brings) if len(starts) > 1 else brings
        taken = len(starts)
        sample.delivered += taken
        brought = Event(
            index=sample.index,
            text=more.text,
            reasoning=more.reasoning,
            calls=more.calls,
            token_ids=tuple(token_ids[:taken]),
            starts=tuple(starts),
            logprobs=logprobs_of(sample, result, slot, taken),
        )
        if text.is_stopped:
            self._end_sample(sample, FinishReason.STOP, brought._replace(stopped_by=text.stopped_by))
        elif result.stopped_B[slot] and sample.delivered < request.max_tokens:
            stop_id = int(result.token_BW[slot, result.kept_B[slot]])
            is_asked = stop_id in request.sampling.stop_token_ids
            self._end_sample(sample, FinishReason.STOP, brought._replace(stopped_by=stop_id if is_asked else None))
        elif sample.delivered == request.max_tokens:
            self._end_sample(sample, FinishReason.LENGTH, brought)
        else:
            emit(request, brought)

    def _end_sample(self, sample: Sample, reason: FinishReason, brought: Event = NOTHING) -> None:
        """`brought`: what its last token brought."""
        request, text = sample.request, self._texts.pop(sample, None)
        sample.done = True
        self._free(sample)
        last = brought._replace(index=sample.index, finish_reason=reason)
        if text is not None:
            more = Brought(brought.text, brought.reasoning, brought.calls).and_then(text.finish())
            last = last._replace(text=more.text, reasoning=more.reasoning, calls=more.calls)
            if reason is FinishReason.STOP and text.has_calls:
                last = last._replace(finish_reason=FinishReason.TOOL_CALLS)
        if all(other.done for other in request.samples):
            last = last._replace(usage=self._close_request(request, OUTCOMES[reason]))
        emit(request, last)

    def _end(self, ending: Ending) -> None:
        if ending.sample is None:
            self._end_request(ending.request, ending.end)
        elif not ending.sample.done:
            self._end_sample(ending.sample, FinishReason.STOP)

    def _end_request(self, request: Request, end: End) -> None:
        if request.done:
            return
        if isinstance(end, FinishReason):
            for sample in [sample for sample in request.samples if not sample.done]:
                self._end_sample(sample, end)
        else:
            # A server that stops has cancelled the request; anything else has failed it.
            self._close_request(request, Outcome.CANCELLED if isinstance(end, UnavailableError) else Outcome.FAILED)
            emit(request, Event(error=end))

    def _close_request(self, request: Request, outcome: Outcome) -> Usage:
        """Nothing comes after the event that this is called for."""
        for sample in request.samples:
            if not sample.done:
                sample.done = True
                self._texts.pop(sample, None)
                self._free(sample)
        if not request.done:
            request.ended_at = time.monotonic()
            self._on_end(request)
            self._count(request, outcome)
            if request.trace is not None:
                request.trace.end(request, outcome.value)
        return usage_of(request)

    def _count(self, request: Request, outcome: Outcome) -> None:
        if self._metrics is None:
            return
        try:
            count(self._metrics, request, outcome)
        except Exception:  # no reason to leave a caller without an answer
            log.exception("request %s could not be counted", request.id)

    def _text(self, sample: Sample) -> Text:
        if sample not in self._texts:
            asked, syntax = sample.request, sample.request.syntax
            self._texts[sample] = Text(
                self._tokenizer.stream(() if syntax is None else syntax.marks),
                asked.stop_strings,
                asked.sampling.min_tokens,
                reader=None if syntax is None else AnswerReader(syntax),
            )
        return self._texts[sample]


def emit(request: Request, event: Event) -> None:
    """A caller that cannot take its event counts as gone: raises CallerGoneError."""
    try:
        request.deliver(event)
    except Exception as error:
        raise CallerGoneError from error


def note_drafts(request: Request, result: HostResult, slot: int) -> None:
    """What became of those that took part in a step."""
    if result.drafted_B is None or result.agreed_B is None:
        return
    asked = min(int(result.drafted_B[slot]), result.width - 1)
    right = min(int(result.agreed_B[slot]), asked)
    request.accepted_draft_tokens += right
    request.rejected_draft_tokens += asked - right


def logprobs_of(sample: Sample, result: HostResult, slot: int, taken: int) -> tuple[TokenLogprob, ...]:
    """Of the first `taken` tokens in `slot`; empty unless the request asked."""
    asked = sample.request.sampling.logprobs
    if asked is None:
        return ()
    assert result.logprob_BW is not None
    logprob_T = result.logprob_BW[slot, :taken]
    if not asked:
        return tokens_of(logprob_T)
    assert result.top_token_BWP is not None
    assert result.top_logprob_BWP is not None
    tops = result.top_token_BWP[slot, :taken, :asked], result.top_logprob_BWP[slot, :taken, :asked]
    return tokens_of(logprob_T, *tops)


def prompt_logprobs_of(request: Request, result: HostResult) -> tuple[TokenLogprob, ...]:
    """One for each token of the prompt; the first is 0 by definition."""
    assert result.next_logprob_T is not None
    count, asked = len(request.prompt_ids) - 1, request.asked_prompt_logprobs
    first, logprob_T = TokenLogprob(0.0), result.next_logprob_T[:count]
    if result.next_top_token_TP is None or result.next_top_logprob_TP is None:
        return (first, *tokens_of(logprob_T))
    tops = result.next_top_token_TP[:count, :asked], result.next_top_logprob_TP[:count, :asked]
    return (first, *tokens_of(logprob_T, *tops))


def tokens_of(
    logprob_T: np.ndarray, top_token_TP: np.ndarray | None = None, top_logprob_TP: np.ndarray | None = None
) -> tuple[TokenLogprob, ...]:
    """Arrays as what is told of each token."""
    if top_token_TP is None or top_logprob_TP is None:
        return tuple(map(TokenLogprob, logprob_T.tolist()))
    rows = zip(logprob_T.tolist(), top_token_TP.tolist(), top_logprob_TP.tolist(), strict=True)
    return tuple(TokenLogprob(logprob, tuple(zip(tokens, logprobs, strict=True))) for logprob, tokens, logprobs in rows)


def usage_of(request: Request) -> Usage:
    """Of a request that has ended."""
    total_s = seconds(request, request.ended_at)
    assert total_s is not None
    return Usage(
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=request.cached_tokens,
        generated_tokens=request.delivered,
        accepted_draft_tokens=request.accepted_draft_tokens,
        rejected_draft_tokens=request.rejected_draft_tokens,
        queue_ms=milliseconds(seconds(request, request.started_at)),
        ttft_ms=milliseconds(seconds(request, request.first_token_at)),
        total_ms=round(total_s * 1000, 3),
    )


def count(metrics: Metrics, request: Request, outcome: Outcome) -> None:
    """Tells the metrics of a request that has ended."""
    e2e_s, ttft_s = seconds(request, request.ended_at), seconds(request, request.first_token_at)
    assert e2e_s is not None
    longest = max(sample.delivered for sample in request.samples)
    metrics.ended(
        outcome,
        prompt_tokens=len(request.prompt_ids),
        cached_tokens=request.cached_tokens,
        generated_tokens=request.delivered,
        queue_s=seconds(request, request.started_at),
        ttft_s=ttft_s,
        tpot_s=(e2e_s - ttft_s) / (longest - 1) if ttft_s is not None and longest > 1 else None,
        e2e_s=e2e_s,
        request_id=request.id,
    )


def seconds(request: Request, stamp: float | None) -> float | None:
    """From its arrival to one of its stamps."""
    return None if stamp is None or request.queued_at is None else stamp - request.queued_at


def milliseconds(duration_s: float | None) -> float | None:
    return None if duration_s is None else round(duration_s * 1000, 3)
