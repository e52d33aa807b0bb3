"""What goes wrong, as OpenAI's clients read it: a status and {"error": {message, type, param, code}}."""

import logging
import math
import re
import reprlib
from functools import partial
from typing import Any

from pydantic import ValidationError

from ...engine_impl.errors import RefusedError, TooLongError
from ..errors import (
    CancelledError,
    DeniedError,
    FailedError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
    brief,
    without_frames,
)
from ..gateway import RETRY_AFTER

log = logging.getLogger(__name__)

INVALID, SERVER = "invalid_request_error", "server_error"
"""OpenAI's types of errors: the caller's, and ours."""

OTHER_NAMES = {"num_samples": "n", "stop_strings": "stop"}
"""Options that OpenAI calls differently."""

OTHER_WORDS = {"model_type": "Input should be an object", "list_type": "Input should be a valid array"}
"""Pydantic speaks of Python's types, clients of JSON's."""

SHOWN = 80
"""The longest value in a message (characters)."""
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict, SHORT.maxstring, SHORT.maxother = 3, 20, 10, SHOWN, SHOWN


class HttpError(Exception):
    """An answer that is none."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self._made_of = (status, message), {"kind": kind, "param": param, "code": code, "headers": headers}
        self.status, self.headers = status, headers or {}
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param or None, "code": code}}

    def __reduce__(self) -> tuple[Any, ...]:
        """It may come from another process."""
        args, named = self._made_of
        return partial(HttpError, **named), args


class BadFieldError(RefusedError):
    """What is wrong with one field of a body."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        return BadFieldError, (self.field, str(self))


KNOWN = RefusedError, UnknownModelError, DeniedError, QueueFullError, UnavailableError, CancelledError, FailedError
"""What http_error() translates."""


def told(error: Exception, request_id: str) -> HttpError:
    """What the client is told; what is neither its doing nor known is logged. Of the others no frames are kept: asyncio
    holds what a thread raised until garbage is collected."""
    if isinstance(error, HttpError):
        without_frames(error)
        return error
    if isinstance(error, KNOWN):
        return http_error(without_frames(error))
    if isinstance(error, ConnectionError):
        return HttpError(400, "the connection was closed")  # nobody reads it
    log.error("request %s failed in the HTTP front", request_id, exc_info=error)
    return HttpError(500, "the server failed; its log tells why", kind=SERVER)


def http_error(error: Exception) -> HttpError:
    """Of one of KNOWN."""
    message = brief(str(error))
    match error:
        case BadFieldError():
            return HttpError(400, message, param=error.field)
        case TooLongError():
            return HttpError(400, message, param=named(message), code="context_length_exceeded")
        case RefusedError():
            return HttpError(400, message, param=named(message))
        case UnknownModelError():
            return HttpError(404, message, param="model", code="model_not_found")
        case DeniedError():
            return HttpError(403, message, code="permission_denied")
        case QueueFullError():
            hints = {
                "retry-after": str(math.ceil(error.retry_after_s)),
                RETRY_AFTER: f"{error.retry_after_s * 1e3:.0f}",
            }
            return HttpError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=hints)
        case UnavailableError() | CancelledError():
            return HttpError(503, message, kind=SERVER, code="unavailable")
        case _:
            return HttpError(500, message, kind=SERVER, code="engine_failed")


def named(message: str) -> str | None:
    """The field that a refusal begins with: "temperature=-1 ...", "logit_bias[5]=101 ...", "logit_bias: ...",
    "messages[0].role=..."."""
    match = re.match(r"([a-z_]+)((\[\d+\])?(\.[a-z_]+(\[\d+\])?)+(?=[=: ])|(\[-?\d+\])?(=|: ))", message)
    if match is None:
        return None
    return match[0] if match[4] else OTHER_NAMES.get(match[1], match[1])


def bad_body(error: ValidationError) -> BadFieldError:
    """The first of what pydantic found wrong, in one line."""
    errors = error.errors(include_url=False)
    first, field = errors[0], field_of(errors[0]["loc"])
    if isinstance(own := first.get("ctx", {}).get("error"), BadFieldError):
        return own
    if first["type"] == "missing":
        return BadFieldError(field, f"{field} is missing")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    told = OTHER_WORDS.get(first["type"], first["msg"])
    return BadFieldError(field, f"{field}={shown(first['input'])}: {told}{more}")


def shown(value: Any) -> str:
    """A value for a message: the beginning of one that is long or deep, which costs little however large it is."""
    text = SHORT.repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def field_of(path: tuple[int | str, ...]) -> str:
    """As one would write it: messages[0].content. Pydantic's names for the kinds of a union, in <>, are left out."""
    field = ""
    for step in path:
        if isinstance(step, int):
            field += f"[{step}]"
        elif not step.startswith("<"):
            field += f".{step}" if field else step
    return field
