"""Conversations in other forms than that of /v1/chat/completions: read into a chat, answered in their own form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ValidationError

from ..config import ChatConfig
from ..delivery.mailbox import Batch
from ..gateway import Deliver
from ..request.events import FinishReason
from ..request.request import Request
from .blocks import Block, Blocks
from .bodies import ChatBody
from .errors import BadFieldError, HttpError, bad_body
from .fields import Function, ToolDefinition
from .readable import Readable
from .token_names import TokenNames

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

Json = dict[str, Any]


class TranslatedBody(Readable):
    """One of them."""

    names: ClassVar[dict[str, str]] = {}
    """What a chat's options are called here, where it differs."""
    is_chat: ClassVar[bool] = True

    model: str | None = None
    stream: bool = False

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Raises BadFieldError."""
        made = super().read(body)
        with cls._own_names():
            made.chat()
        return made

    @abstractmethod
    def chat(self) -> ChatBody:
        """The same, as a chat. Raises BadFieldError."""

    @property
    def num_prompts(self) -> int:
        return 1

    def requests(
        self,
        request_id: str,
        engine: "Engine",
        deliver_to: Callable[[int], Deliver],
        token: str | None,
        config: ChatConfig,
    ) -> list[Request]:
        """As Body.requests()."""
        with self._own_names():
            return self.chat().requests(request_id, engine, deliver_to, token, config)

    @classmethod
    @contextmanager
    def _own_names(cls) -> Iterator[None]:
        """Of fields that are refused."""
        try:
            yield
        except BadFieldError as error:
            own, told = cls.names.get(error.field, error.field), str(error)
            told = own + told.removeprefix(error.field) if told.startswith(error.field) else told
            raise BadFieldError(own, told) from error


def as_chat(**fields: Any) -> ChatBody:
    """Raises BadFieldError."""
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        raise bad_body(error) from error


def function(name: str, description: str | None, parameters: str | None, strict: bool | None) -> ToolDefinition:
    """A tool as a chat has it. `parameters`: a schema (JSON)."""
    of = Function.model_construct(name=name, description=description, parameters=parameters, strict=strict)
    return ToolDefinition.model_construct(type="function", function=of)


def call(call_id: str, name: str, arguments: str) -> Json:
    """The call of a tool, likewise. `arguments`: JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class TranslatedAnswer(ABC):
    """To one call, with one choice."""

    is_large = False

    def __init__(
        self, body: TranslatedBody, requests: Sequence[Request], request_id: str, model: str, names: TokenNames
    ) -> None:
        self._body, self._id, self._model, self._names = body, request_id, model, names
        self._prompt_tokens = len(requests[0].prompt_ids)
        self._cached_tokens = self._answer_tokens = 0
        self._blocks = Blocks()
        self._finish_reason: FinishReason | None = None
        self._stopped_by: str | int | None = None
        self._has_begun, self._shown = False, None  # of a stream, and the block that it is in

    def add(self, batch: Batch) -> None:
        for _ in self._grown(batch):
            pass

    def frames(self, batch: Batch) -> bytes:
        """What a stream brings for `batch`."""
        grown = list(self._grown(batch))
        if not (grown or self._finish_reason):
            return b""
        frames = [*self._begun()]
        for block, more in grown:
            frames += self._entered(block)
            if more:
                frames.append(self._delta(block, more))
        return b"".join(frames)

    def last_frames(self) -> bytes:
        frames = [*self._begun(), *([] if self._shown else self._entered(self._blocks.all[0]))]
        return b"".join([*frames, *self._left(), *self._closing()])

    def _grown(self, batch: Batch) -> Iterator[tuple[Block, str]]:
        for _, event in batch:
            yield from self._blocks.grow(event)
            if event.finish_reason is not None:
                self._finish_reason, self._stopped_by = event.finish_reason, event.stopped_by
            if event.usage is not None:
                self._cached_tokens = event.usage.cached_tokens
                self._answer_tokens = event.usage.generated_tokens

    def _begun(self) -> Iterable[bytes]:
        first, self._has_begun = [] if self._has_begun else self._opening(), True
        return first

    def _entered(self, block: Block) -> Iterator[bytes]:
        if block is not self._shown:
            yield from self._left()
            self._shown = block
            yield from self._begin(block)

    def _left(self) -> Iterable[bytes]:
        return [] if self._shown is None else self._end(self._shown)

    @property
    def _is_cut(self) -> bool:
        """Whether the answer would have gone on."""
        return self._finish_reason not in (FinishReason.STOP, FinishReason.TOOL_CALLS)

    @abstractmethod
    def error_frames(self, error: HttpError) -> bytes:
        """How a stream ends that fails."""

    @abstractmethod
    def whole(self) -> Json:
        """Once everything is added."""

    @abstractmethod
    def _opening(self) -> Iterable[bytes]:
        """Before the first block."""

    @abstractmethod
    def _begin(self, block: Block) -> Iterable[bytes]: ...

    @abstractmethod
    def _delta(self, block: Block, more: str) -> bytes: ...

    @abstractmethod
    def _end(self, block: Block) -> Iterable[bytes]: ...

    @abstractmethod
    def _closing(self) -> Iterable[bytes]:
        """Behind the last block."""
