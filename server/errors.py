"""Why a sound request is not answered. What is wrong with a request itself is a RefusedError."""


class QueueFullError(Exception):
    """Too many requests wait already: RESOURCE_EXHAUSTED on the wire."""


class UnavailableError(Exception):
    """The server is loading, stopping or broken: UNAVAILABLE on the wire."""


class FailedError(Exception):
    """The engine failed while it worked on the request: INTERNAL on the wire."""
