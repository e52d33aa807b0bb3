"""Why a sound request is not answered. What is wrong with a request itself is a RefusedError."""

FIRST_RETRY_S = 1.0
"""The retry hint before anything is known of the pace (seconds)."""


class QueueFullError(Exception):
    """Too many requests wait already: RESOURCE_EXHAUSTED on the wire."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When a place may be free again (s), by how fast requests left the queue lately."""


class UnavailableError(Exception):
    """The server is loading, stopping or broken: UNAVAILABLE on the wire."""


class DeadlineError(Exception):
    """The caller's time is up: DEADLINE_EXCEEDED on the wire."""


class CancelledError(Exception):
    """The caller left, so nobody reads this: CANCELLED on the wire."""


class UnknownModelError(Exception):
    """A model or an adapter is asked for that is not served: NOT_FOUND on the wire."""


class DeniedError(Exception):
    """The caller may not do this: PERMISSION_DENIED on the wire."""


class FailedError(Exception):
    """The engine failed while it worked on the request: INTERNAL on the wire."""


LONGEST, TAIL = 600, 200
"""Of what a caller is told (characters), and how much of it is from the message's end, where the remedy stands. As
gRPC's metadata a character may take twelve bytes, of which clients take 8,192."""


def brief(message: str) -> str:
    """A message for a caller, who may have sent the megabytes that it quotes."""
    return message if len(message) <= LONGEST else f"{message[: LONGEST - TAIL - 5]} ... {message[-TAIL:]}"


def without_frames(error: Exception) -> Exception:
    """The error and what it came from, without the frames in which they were raised: what is raised behind it would
    keep them, and with them a call's megabytes, until garbage is collected."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
