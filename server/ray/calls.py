"""What travels between the deployments: calls as they came, and what is answered."""

from dataclasses import dataclass

Headers = tuple[tuple[str, str], ...]
"""Of HTTP or gRPC (there called metadata): names in lower case, in order."""


@dataclass(frozen=True)
class HttpCall:
    """A request to the HTTP front."""

    method: str
    target: str
    """Path and query, in percent encoding."""
    headers: Headers
    body: bytes
    chain: tuple[bytes, ...]
    """Of its prompt, see chain.py."""


@dataclass(frozen=True)
class HttpHead:
    """What comes before a body."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class GrpcCall:
    """A call of the gRPC front."""

    method: str
    """/SERVICE/METHOD"""
    metadata: Headers
    body: bytes
    """The message's."""
    chain: tuple[bytes, ...]


@dataclass(frozen=True)
class GrpcEnd:
    """What comes behind the messages."""

    code: str
    """A name of grpc.StatusCode."""
    details: str
