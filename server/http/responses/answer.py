"""What clients of /v1/responses get."""

import itertools
import time
from collections.abc import Iterable
from typing import Any

from ..errors import HttpError
from ..events import event
from ..translated import Json, TranslatedAnswer
from .body import ResponsesBody


class ResponsesAnswer(TranslatedAnswer):
    """One message."""

    _body: ResponsesBody

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._created, self._numbers = int(time.time()), itertools.count()

    def whole(self) -> Json:
        is_whole = self._piece.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        ending = {} if is_whole else {"incomplete_details": {"reason": "max_output_tokens"}}
        return self._response(status, [self._message(status)]) | ending | {"usage": self._usage()}

    def _response(self, status: str, output: list[Json]) -> Json:
        """What was asked, as OpenAI repeats it; what is not there has the values that ask for nothing."""
        asked = self._body
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": asked.metadata,
        }

    def _message(self, status: str) -> Json:
        named = {"id": f"msg_{self._id}", "type": "message", "role": "assistant", "status": status}
        return named | {"content": [] if status == "in_progress" else [self._part(self._piece.text)]}

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self) -> Json:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._cached_tokens},
            "output_tokens": self._answer_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + self._answer_tokens,
        }

    def _opening(self) -> Iterable[bytes]:
        yield self._event("response.created", response=self._response("in_progress", []))
        yield self._event("response.in_progress", response=self._response("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield self._of_part("response.content_part.added", part=self._part(""))

    def _delta(self, text: str) -> bytes:
        return self._of_part("response.output_text.delta", delta=text, logprobs=[])

    def _closing(self) -> Iterable[bytes]:
        whole = self.whole()
        yield self._of_part("response.output_text.done", text=self._piece.text, logprobs=[])
        yield self._of_part("response.content_part.done", part=self._part(self._piece.text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def error_frames(self, error: HttpError) -> bytes:
        told = error.body["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _of_part(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=f"msg_{self._id}", output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)
