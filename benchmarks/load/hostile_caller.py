"""Hostile inputs sent to a server, at whichever of its doors each belongs."""

import io
from contextlib import AbstractAsyncContextManager
from typing import Any, Self

import aiohttp
import grpc

from .hostile_inputs import DECODE, INPUTS

JSON = {"content-type": "application/json"}


class HostileCaller(AbstractAsyncContextManager["HostileCaller"]):
    """Inputs of one size, on connections of their own. Enter it."""

    def __init__(self, address: str, http_address: str, size: int, timeout_s: float) -> None:
        """`size` of each input (bytes)."""
        self._url, self._timeout_s = f"http://{http_address}", timeout_s
        self._made = {name: (path, make(size)) for name, (path, make) in INPUTS.items()}
        self._channel = grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(
            self._url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout, headers=JSON
        )
        return self

    async def __aexit__(self, *of_error: object) -> None:
        assert self._session is not None
        await self._session.close()
        await self._channel.close()

    async def send(self, name: str) -> str:
        """What it was told: a gRPC status by its name, or an HTTP status by its number."""
        path, data = self._made[name]
        if path != DECODE:
            assert self._session is not None
            async with self._session.post(path, data=io.BytesIO(data)) as response:
                await response.read()
                return str(response.status)
        decode: Any = self._channel.unary_stream(DECODE)
        try:
            async for _ in decode(data, timeout=self._timeout_s):
                pass
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"
