"""Conversations in other forms than that of /v1/chat/completions: read into a chat, answered in their own form."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ValidationError

from ..config import ChatConfig
from ..delivery.mailbox import Batch
from ..gateway import Deliver
from ..request.request import Request
from .bodies import ChatBody
from .errors import BadFieldError, HttpError, bad_body
from .pieces import Piece
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
            raise BadFieldError(cls.names.get(error.field, error.field), str(error)) from error


def as_chat(**fields: Any) -> ChatBody:
    """Raises BadFieldError."""
    try:
        return ChatBody.model_validate(fields)
    except ValidationError as error:
        raise bad_body(error) from error


class TranslatedAnswer(ABC):
    """To one call, with one choice."""

    is_large = False

    def __init__(
        self, body: TranslatedBody, requests: Sequence[Request], request_id: str, model: str, names: TokenNames
    ) -> None:
        self._body, self._id, self._model, self._names = body, request_id, model, names
        self._prompt_tokens = len(requests[0].prompt_ids)
        self._cached_tokens = self._answer_tokens = 0
        self._piece = Piece()
        self._has_begun = False

    def add(self, batch: Batch) -> None:
        for _, event in batch:
            self._piece.grow(event)
            if event.usage is not None:
                self._cached_tokens = event.usage.cached_tokens
                self._answer_tokens = event.usage.generated_tokens

    def frames(self, batch: Batch) -> bytes:
        """What a stream brings for `batch`."""
        before = len(self._piece.text)
        self.add(batch)
        text = self._piece.text[before:]
        if not (text or self._piece.finish_reason):
            return b""
        first = [] if self._has_begun else self._opening()
        self._has_begun = True
        return b"".join([*first, *([self._delta(text)] if text else [])])

    def last_frames(self) -> bytes:
        return b"".join(self._closing())

    @abstractmethod
    def error_frames(self, error: HttpError) -> bytes:
        """How a stream ends that fails."""

    @abstractmethod
    def whole(self) -> Json:
        """Once everything is added."""

    @abstractmethod
    def _opening(self) -> Iterable[bytes]:
        """Before the first text."""

    @abstractmethod
    def _delta(self, text: str) -> bytes: ...

    @abstractmethod
    def _closing(self) -> Iterable[bytes]:
        """Behind the last text."""
