"""The application without a cluster: an ingress whose replica is in this process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

from ray.serve.handle import DeploymentHandle
from slipstream.server.ray.fronts import Fronts
from slipstream.server.ray.ingress import Ingress
from slipstream.server.ray.settings import configs
from starlette.requests import Request

from tests.fakes import FakeEngine


class Answer:
    """A DeploymentResponseGenerator, as far as an ingress knows it."""

    def __init__(self, parts: Any) -> None:
        self._parts, self.cancelled = parts, False

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._parts)

    def cancel(self) -> None:
        self.cancelled = True

    async def closed(self) -> None:
        """What Serve does with a generator at the replica whose caller has cancelled it."""
        with suppress(asyncio.CancelledError, StopAsyncIteration):
            await self._parts.athrow(asyncio.CancelledError())


class Handle:
    """A DeploymentHandle, likewise; `calls` tells what was asked."""

    def __init__(self, replica: Any) -> None:
        self._replica, self.calls, self.answers = replica, list[Any](), list[Answer]()

    def options(self, *, method_name: str, stream: bool) -> Any:
        assert stream

        def remote(call: Any) -> Answer:
            self.calls.append(call)
            self.answers.append(Answer(getattr(self._replica, method_name)(call)))
            return self.answers[-1]

        return SimpleNamespace(remote=remote)


def ingress_of(handle: Handle, **args: Any) -> Ingress:
    return Ingress(cast(DeploymentHandle, handle), configs(args)[1].security)


@asynccontextmanager
async def served(engine: FakeEngine | None = None, **args: Any) -> AsyncIterator[tuple[Ingress, Handle, Fronts]]:
    """`args`: flags."""
    engine, config = engine or FakeEngine(), configs({"grace": 5, "probe-interval": 0, **args})[1]
    async with Fronts(lambda: (engine, None), config) as fronts:
        handle = Handle(fronts)
        yield ingress_of(handle, **args), handle, fronts


async def ask(
    ingress: Ingress, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, root: str = ""
) -> tuple[int, dict[str, str], list[bytes]]:
    """(status, headers, the body in its parts)"""
    target, _, query = path.partition("?")
    sent = {"host": "a.example", "content-length": str(len(body)), "x-request-id": "from-serve", **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": target,
        "raw_path": target.encode(),
        "root_path": root,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("192.0.2.7", 5000),
    }
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        told.append(message)

    request = Request(scope, receive)
    await (await ingress(request))(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)
    start, *parts = told
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert len(headers) == len(start["headers"])
    return start["status"], headers, [part["body"] for part in parts if part["body"]]
