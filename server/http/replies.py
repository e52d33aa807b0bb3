"""What clients get: a response in one piece, or its chunks, as OpenAI writes them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ..delivery.mailbox import Batch
from ..dialects.parts import CallPart
from ..request.events import TokenLogprob
from ..request.request import Request
from . import events
from .bodies import Body
from .errors import HttpError
from .pieces import Piece, Pieces, grow, no_pieces
from .token_names import TokenNames

LEAST = -9999.0
"""OpenAI's for a logprob of minus infinity, which JSON cannot tell."""

Json = dict[str, Any]


class Reply(ABC):
    """To one call. Choices are numbered prompt * n + sample."""

    prefix: ClassVar[str]
    """Of its id."""
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    """OpenAI's `object`."""

    def __init__(self, body: Body, requests: Sequence[Request], request_id: str, model: str, names: TokenNames) -> None:
        self.has_usage_chunk = body.has_usage_chunk
        """Whether a stream ends with its usage."""
        self._body, self._requests, self._names = body, requests, names
        self._head: Json = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._accepted_tokens = self._rejected_tokens = 0
        self._pieces = no_pieces()
        self._begun: set[int] = set()  # the choices that had a chunk

    def add(self, batch: Batch) -> None:
        """For whole()."""
        grow(self._pieces, batch, self._body.n)
        self._count(batch)

    def whole(self) -> Json:
        """Once everything is added."""
        pieces = [self._opened(number, self._pieces[number]) for number in range(len(self._requests) * self._body.n)]
        choices = [self._choice(number, self._whole(piece), piece) for number, piece in enumerate(pieces)]
        return {"object": self.whole_kind, **self._head, "choices": choices, "usage": self._usage()}

    def chunk(self, batch: Batch) -> Json | None:
        """What `batch` brings; None when there is nothing to show yet."""
        self._count(batch)
        pieces = no_pieces()
        grow(pieces, batch, self._body.n)
        choices = list(self._deltas(pieces))
        if not choices:
            return None
        chunk = {"object": self.chunk_kind, **self._head, "choices": choices}
        return chunk | {"usage": None} if self.has_usage_chunk else chunk

    def frames(self, batch: Batch) -> bytes:
        """What a stream brings for `batch`; empty when there is nothing to show yet."""
        chunk = self.chunk(batch)
        return b"" if chunk is None else events.event(chunk)

    def last_frames(self) -> bytes:
        """Once everything is shown."""
        return (events.event(self.usage_chunk()) if self.has_usage_chunk else b"") + events.DONE

    def error_frames(self, error: HttpError) -> bytes:
        """How a stream ends that fails."""
        return events.event(error.body)

    def usage_chunk(self) -> Json:
        """The last one, for who asked for it."""
        return {"object": self.chunk_kind, **self._head, "choices": [], "usage": self._usage()}

    @property
    def is_large(self) -> bool:
        """Whether to make it takes long enough to be done in a thread."""
        return self._body.asked_prompt_logprobs is not None

    def _opened(self, number: int, piece: Piece) -> Piece:
        """A choice's first piece, with what is shown before the answer."""
        return piece

    @abstractmethod
    def _whole(self, piece: Piece) -> Json:
        """A choice's text in one piece."""

    @abstractmethod
    def _delta(self, piece: Piece, *, is_first: bool) -> Json:
        """What a choice's text grows by."""

    @abstractmethod
    def _logprobs(self, piece: Piece) -> Json: ...

    def _deltas(self, pieces: Pieces) -> Iterable[Json]:
        for number, piece in sorted(pieces.items()):
            has_tokens = bool(piece.token_ids) and (self._body.return_token_ids or bool(piece.logprobs))
            brings = piece.text or piece.reasoning or piece.calls
            if brings or piece.finish_reason or piece.prompt_logprobs or has_tokens:
                is_first = number not in self._begun
                self._begun.add(number)
                shown = self._opened(number, piece) if is_first else piece
                yield self._choice(number, self._delta(shown, is_first=is_first), shown)

    def _choice(self, number: int, text: Json, piece: Piece) -> Json:
        choice = {"index": number, **text, "logprobs": None, "finish_reason": piece.finish_reason}
        if piece.stopped_by is not None:
            choice["stop_reason"] = piece.stopped_by  # vLLM's
        if piece.logprobs:
            choice["logprobs"] = self._logprobs(piece)
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids[piece.echoed :]
        if piece.prompt_logprobs is not None and self._body.told_prompt_logprobs is not None:
            prompt_ids = self._requests[number // self._body.n].prompt_ids
            choice["prompt_logprobs"] = self._of_prompt(prompt_ids, piece.prompt_logprobs)
        return choice

    def _of_prompt(self, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[Json | None]:
        """As vLLM writes them: by token id; the first has none."""
        tokens = zip(prompt_ids[1:], logprobs[1:], strict=True)
        return [None, *(self._by_id(token_id, token) for token_id, token in tokens)]

    def _by_id(self, own_id: int, token: TokenLogprob) -> Json:
        """The token itself, then the likeliest. Its rank (1: the likeliest) is known if it is among them."""
        top = token.top[: self._body.told_prompt_logprobs]
        ranks: dict[int, int | None] = {own_id: None}
        ranks |= {token_id: rank for rank, (token_id, _) in enumerate(top, 1)}
        values = dict(top) | {own_id: token.logprob}
        return {
            str(token_id): {
                "logprob": finite(values[token_id]),
                "rank": rank,
                "decoded_token": self._names.of(token_id).text,
            }
            for token_id, rank in ranks.items()
        }

    def _count(self, batch: Batch) -> None:
        for _, event in batch:
            if event.usage is not None:
                self._prompt_tokens += event.usage.prompt_tokens
                self._cached_tokens += event.usage.cached_tokens
                self._completion_tokens += event.usage.generated_tokens
                self._accepted_tokens += event.usage.accepted_draft_tokens
                self._rejected_tokens += event.usage.rejected_draft_tokens

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self._accepted_tokens,
                "rejected_prediction_tokens": self._rejected_tokens,
            },
        }


class ChatReply(Reply):
    """A turn of the assistant's."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _whole(self, piece: Piece) -> Json:
        message: Json = {"role": "assistant", "content": None if piece.calls and not piece.text else piece.text}
        if piece.reasoning:
            message["reasoning_content"] = piece.reasoning
        if piece.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in piece.calls
            ]
        return {"message": message}

    def _delta(self, piece: Piece, *, is_first: bool) -> Json:
        delta: Json = {"role": "assistant"} if is_first else {}
        if piece.text or not (piece.reasoning or piece.calls):
            delta["content"] = piece.text
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            delta["tool_calls"] = list(map(call_delta, piece.calls))
        return {"delta": delta}

    def _logprobs(self, piece: Piece) -> Json:
        tokens = zip(piece.token_ids, piece.logprobs, strict=True)
        return {
            "content": [
                self._token(token_id, token.logprob) | {"top_logprobs": [self._token(*other) for other in token.top]}
                for token_id, token in tokens
            ]
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        name = self._names.of(token_id)
        return {"token": name.text, "logprob": finite(logprob), "bytes": name.bytes}


def call_delta(part: CallPart) -> Json:
    """The first of a call names it."""
    named = {"id": part.id, "type": "function"} if part.id else {}
    name = {"name": part.name} if part.id else {}
    return {"index": part.index, **named, "function": {**name, "arguments": part.arguments}}


def finite(logprob: float) -> float:
    return max(logprob, LEAST)
