"""What clients of /v1/messages get."""

import json
from collections.abc import Iterable
from typing import Any

from ...request.events import FinishReason
from ..blocks import Block
from ..errors import HttpError
from ..events import event
from ..translated import Json, TranslatedAnswer
from .body import MessagesBody

ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""What a status is called; others of ours are api_error, of the caller's invalid_request_error."""


class MessagesAnswer(TranslatedAnswer):
    """A message of the assistant's."""

    _body: MessagesBody

    def whole(self) -> Json:
        content = [told for block in self._blocks.all if (told := whole_block(block)) is not None]
        return self._message(content) | self._ending() | {"usage": self._usage()}

    def _message(self, content: list[Json]) -> Json:
        named = {"id": f"msg_{self._id}", "type": "message", "role": "assistant", "model": self._model}
        return named | {"content": content, "stop_reason": None, "stop_sequence": None}

    def _usage(self) -> Json:
        return {
            "input_tokens": self._prompt_tokens - self._cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached_tokens,
            "output_tokens": self._answer_tokens,
        }

    def _ending(self) -> Json:
        """Why it ends, and the stop sequence, if that was met."""
        if self._is_cut:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if (met := self._stopped_by) is None:
            calls = self._finish_reason is FinishReason.TOOL_CALLS
            return {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
        return {"stop_reason": "stop_sequence", "stop_sequence": met if isinstance(met, str) else self._named(met)}

    def _named(self, stop_id: int) -> str:
        """The stop sequence that is a control token."""
        return self._names.tokenizer.token(stop_id)

    def _opening(self) -> Iterable[bytes]:
        yield self._event("message_start", message=self._message([]) | {"usage": self._usage()})

    def _begin(self, block: Block) -> Iterable[bytes]:
        begun = call_block(block, {}) if block.is_call else {"type": "text", "text": ""}
        yield self._event("content_block_start", index=block.index, content_block=begun)

    def _delta(self, block: Block, more: str) -> bytes:
        if block.is_call:
            delta = {"type": "input_json_delta", "partial_json": more}
        else:
            delta = {"type": "text_delta", "text": more}
        return self._event("content_block_delta", index=block.index, delta=delta)

    def _end(self, block: Block) -> Iterable[bytes]:
        yield self._event("content_block_stop", index=block.index)

    def _closing(self) -> Iterable[bytes]:
        yield self._event("message_delta", delta=self._ending(), usage=self._usage())
        yield self._event("message_stop")

    def error_frames(self, error: HttpError) -> bytes:
        return event(error_body(error), "error")

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)


def whole_block(block: Block) -> Json | None:
    """None: a call that was cut off within its arguments, which are no object then."""
    if not block.is_call:
        return {"type": "text", "text": block.text}
    try:
        return call_block(block, json.loads(block.text))
    except ValueError:
        return None


def call_block(block: Block, arguments: Json) -> Json:
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}


def error_body(error: HttpError) -> Json:
    """In Anthropic's form."""
    kind = ERRORS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.body["error"]["message"]}}
