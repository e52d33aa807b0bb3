"""What clients get: a response in one piece, or its chunks, as OpenAI writes them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from ..delivery.mailbox import Batch
from ..dialects.parts import CallPart
from ..request.request import Request, TokenLogprob
from .bodies import Body
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
        self._pieces = no_pieces()
        self._shown: dict[int, int] = {}  # characters in earlier chunks, of the choices that had one

    def add(self, batch: Batch) -> None:
        """For whole()."""
        grow(self._pieces, batch, self._body.n)
        self._count(batch)

    def whole(self) -> Json:
        """Once everything is added."""
        numbers = range(len(self._requests) * self._body.n)
        choices = [self._choice(number, self._whole(self._pieces[number]), self._pieces[number]) for number in numbers]
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

    def usage_chunk(self) -> Json:
        """The last one, for who asked for it."""
        return {"object": self.chunk_kind, **self._head, "choices": [], "usage": self._usage()}

    @abstractmethod
    def _whole(self, piece: Piece) -> Json:
        """A choice's text in one piece."""

    @abstractmethod
    def _delta(self, piece: Piece, *, is_first: bool) -> Json:
        """What a choice's text grows by."""

    @abstractmethod
    def _logprobs(self, piece: Piece, start: int) -> Json:
        """`start`: characters shown before."""

    def _deltas(self, pieces: Pieces) -> Iterable[Json]:
        for number, piece in sorted(pieces.items()):
            has_tokens = bool(piece.token_ids) and (self._body.return_token_ids or bool(piece.logprobs))
            brings = piece.text or piece.reasoning or piece.calls
            if brings or piece.finish_reason or piece.prompt_logprobs or has_tokens:
                yield self._choice(number, self._delta(piece, is_first=number not in self._shown), piece)
                self._shown[number] = self._shown.get(number, 0) + len(piece.text)

    def _choice(self, number: int, text: Json, piece: Piece) -> Json:
        choice = {"index": number, **text, "logprobs": None, "finish_reason": piece.finish_reason}
        if piece.logprobs:
            choice["logprobs"] = self._logprobs(piece, self._shown.get(number, 0))
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        if piece.prompt_logprobs is not None:
            prompt_ids = self._requests[number // self._body.n].prompt_ids
            choice["prompt_logprobs"] = self._of_prompt(prompt_ids, piece.prompt_logprobs)
        return choice

    def _of_prompt(self, prompt_ids: Sequence[int], logprobs: Sequence[float]) -> list[Json | None]:
        """As vLLM writes them: by token id; the first has none."""
        tokens = zip(prompt_ids, logprobs, strict=True)
        of_each = [
            {str(token_id): {"logprob": finite(logprob), "decoded_token": self._names.of(token_id).text}}
            for token_id, logprob in tokens
        ]
        return [None, *of_each[1:]]

    def _count(self, batch: Batch) -> None:
        for _, event in batch:
            if event.usage is not None:
                self._prompt_tokens += event.usage.prompt_tokens
                self._cached_tokens += event.usage.cached_tokens
                self._completion_tokens += event.usage.generated_tokens

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


class CompletionReply(Reply):
    """Of raw text."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _whole(self, piece: Piece) -> Json:
        return {"text": piece.text}

    def _delta(self, piece: Piece, *, is_first: bool) -> Json:
        return {"text": piece.text}

    def _logprobs(self, piece: Piece, start: int) -> Json:
        names = [self._names.of(token_id).text for token_id in piece.token_ids]
        return {
            "tokens": names,
            "token_logprobs": [finite(token.logprob) for token in piece.logprobs],
            "top_logprobs": [self._top(name, token) for name, token in zip(names, piece.logprobs, strict=True)],
            "text_offset": [start + at for at in piece.starts],
        }

    def _top(self, chosen: str, token: TokenLogprob) -> dict[str, float]:
        """By text; the chosen token is always there. Of two tokens of one text, the likelier counts."""
        top: dict[str, float] = {}
        for token_id, logprob in token.top:
            top.setdefault(self._names.of(token_id).text, finite(logprob))
        top.setdefault(chosen, finite(token.logprob))
        return top


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

    def _logprobs(self, piece: Piece, start: int) -> Json:
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
