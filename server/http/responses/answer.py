"""What clients of /v1/responses get."""

import itertools
import time
from collections.abc import Iterable
from typing import Any

from ..blocks import Block
from ..errors import HttpError
from ..events import event
from ..translated import Json, TranslatedAnswer
from .body import ResponsesBody


class ResponsesAnswer(TranslatedAnswer):
    """Messages, and calls of tools."""

    _body: ResponsesBody

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._created, self._numbers = int(time.time()), itertools.count()
        self._tools = [tool.told() for tool in self._body.tools]
        asked = self._body.text.format
        self._format = {"type": "text"} if asked is None else asked.model_dump(by_alias=True, exclude_none=True)

    def whole(self) -> Json:
        status = "incomplete" if self._is_cut else "completed"
        blocks = self._blocks.all
        output = [self._item(block, status if block is blocks[-1] else "completed") for block in blocks]
        ending = {"incomplete_details": {"reason": "max_output_tokens"}} if self._is_cut else {}
        return self._response(status, output) | ending | {"usage": self._usage()}

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
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": self._format},
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else asked.tool_choice.model_dump(),
            "tools": self._tools,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": asked.metadata,
        }

    def _item(self, block: Block, status: str) -> Json:
        """Of the output; what is in progress has nothing yet."""
        item, is_begun = {"id": self._item_id(block), "status": status}, status == "in_progress"
        if block.is_call:
            arguments = "" if is_begun else block.text
            return item | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": arguments}
        content = [] if is_begun else [self._part(block.text)]
        return item | {"type": "message", "role": "assistant", "content": content}

    def _item_id(self, block: Block) -> str:
        return f"{'fc' if block.is_call else 'msg'}_{self._id}" + (f"_{block.index}" if block.index else "")

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
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", []))

    def _begin(self, block: Block) -> Iterable[bytes]:
        item = self._item(block, "in_progress")
        yield self._event("response.output_item.added", output_index=block.index, item=item)
        if not block.is_call:
            yield self._of_part("response.content_part.added", block, part=self._part(""))

    def _delta(self, block: Block, more: str) -> bytes:
        if block.is_call:
            return self._of_item("response.function_call_arguments.delta", block, delta=more)
        return self._of_part("response.output_text.delta", block, delta=more, logprobs=[])

    def _end(self, block: Block) -> Iterable[bytes]:
        if block.is_call:
            yield self._of_item("response.function_call_arguments.done", block, name=block.name, arguments=block.text)
        else:
            yield self._of_part("response.output_text.done", block, text=block.text, logprobs=[])
            yield self._of_part("response.content_part.done", block, part=self._part(block.text))
        is_cut = self._is_cut and self._finish_reason is not None and block is self._blocks.all[-1]
        item = self._item(block, "incomplete" if is_cut else "completed")
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _closing(self) -> Iterable[bytes]:
        whole = self.whole()
        yield self._event(f"response.{whole['status']}", response=whole)

    def error_frames(self, error: HttpError) -> bytes:
        told = error.body["error"]
        return self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _of_part(self, kind: str, block: Block, **fields: Any) -> bytes:
        return self._of_item(kind, block, content_index=0, **fields)

    def _of_item(self, kind: str, block: Block, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._item_id(block), output_index=block.index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)
