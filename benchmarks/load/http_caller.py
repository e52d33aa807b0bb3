"""Requests over HTTP, to any server that speaks OpenAI's: ours, vLLM, SGLang, llama.cpp.

A request is POST /v1/completions with a prompt of token ids, streamed, greedy. Two fields are vLLM's extensions, which
we have too: return_token_ids, so that tokens are counted and timed as they come, and ignore_eos. Where a server sends
no ids, the last chunk's usage tells how many tokens there were, and the chunks with text when they came.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import aiohttp

from ...engine_impl.errors import RefusedError
from ...server.errors import UnavailableError
from ...server.grpc.channel import PLAIN, ChannelConfig, metadata
from .caller import CONNECT_S, Record
from .workload import LoadRequest

DATA, DONE = b"data:", b"[DONE]"


class HttpCaller:
    """A Caller with a connection for each request: one that is kept may be closed by the server at the moment when the
    next request is written (llama.cpp's server closes its end behind an answer), which counts as a failure of it.

    `model`: the name in every request; None takes the first that the server lists. `ignore_eos`: answers go on past
    the model's stop tokens to their whole length. Raises RefusedError for TLS files that cannot be used.
    """

    def __init__(
        self,
        target: str,
        timeout_s: float,
        security: ChannelConfig = PLAIN,
        *,
        model: str | None = None,
        ignore_eos: bool = False,
    ) -> None:
        self._url = target.rstrip("/").removesuffix("/v1")  # people paste OpenAI's base URL
        self._timeout_s, self._tls = timeout_s, _tls(self._url, security)
        self._headers = dict(metadata(security)) | {"accept-encoding": "identity"}  # nothing that holds chunks back
        self._model, self._ignore_eos = model, ignore_eos

    async def __aenter__(self) -> Self:
        """Also raises UnavailableError for a server that lists no models, unless one was named."""
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        try:
            listed = await self._knock()
            self._model = self._model or _first_model(self._url, listed)
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def call(self, ask: LoadRequest, record: Record) -> None:
        """See Caller. 429 is a rejection, any other status a failure."""
        record.prompt_tokens = len(ask.prompt_ids)
        body = {
            "model": self._model,
            "prompt": ask.prompt_ids,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        } | ({"ignore_eos": True} if self._ignore_eos else {})  # strict servers refuse fields that they do not know
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status == 200:
                    record.detail = await _read_answer(response, record)
                    record.status = "failed" if record.detail else "completed"
                else:
                    record.detail = f"{response.status}: {_message(await response.text())}"
                    record.status = "rejected" if response.status == 429 else "failed"
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:  # ValueError: no JSON, or a line without end
            record.status, record.detail = "failed", f"{type(error).__name__}: {error}"
        record.end = time.perf_counter()

    async def _knock(self) -> str:
        """What GET /v1/models says, a refusal too."""
        try:
            async with asyncio.timeout(CONNECT_S), self._session.get(f"{self._url}/v1/models") as response:
                return await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            what = f"nobody answers at {self._url} ({error or 'no answer'})"
            raise UnavailableError(f"{what}; `slipstream serve --http-port` starts a server") from error


async def _read_answer(response: aiohttp.ClientResponse, record: Record) -> str:
    """Fills in times and tokens; what is wrong with the answer, "" when nothing is."""
    usage: int | None = None
    has_ids = is_whole = False
    async for data in _events(response):
        now = time.perf_counter()
        if data == DONE:
            is_whole = True
            break
        chunk = json.loads(data)
        if "choices" not in chunk:  # {"error": ...}
            return f"in the stream: {_message(data.decode())}"
        if counted := chunk.get("usage"):
            usage = counted["completion_tokens"]
            record.cached_tokens = (counted.get("prompt_tokens_details") or {}).get("cached_tokens")
        for choice in chunk["choices"]:
            ids = choice.get("token_ids")
            has_ids = has_ids or ids is not None
            if ids or (ids is None and choice.get("text")):
                record.token_times.append(now)
                record.tokens += len(ids or ())
    if not is_whole:
        return f"the stream ended before its {DONE.decode()}"
    if not has_ids and usage is None:
        return "the server tells neither token ids nor usage, so its tokens cannot be counted"
    if not has_ids:
        record.tokens = usage or 0
    return ""


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """What follows "data:" in each line of the stream."""
    async for line in response.content:
        if line.startswith(DATA):
            yield line[len(DATA) :].strip()


def _first_model(url: str, listed: str) -> str:
    try:
        return json.loads(listed)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise UnavailableError(f"{url}/v1/models names no model ({_message(listed)}); name one with --model") from error


def _message(text: str) -> str:
    """What an error's body says: OpenAI's error.message, or its beginning."""
    try:
        body: Any = json.loads(text)
        return str(body["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(text[:200].split())


def _tls(url: str, security: ChannelConfig) -> ssl.SSLContext | bool:
    """True checks the server's certificate against the usual authorities."""
    if not url.startswith("https://") or (security.tls_ca is None and security.tls_cert is None):
        return True
    try:
        context = ssl.create_default_context(cafile=security.tls_ca)
        if security.tls_cert is not None:
            context.load_cert_chain(security.tls_cert, security.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise RefusedError(
            f"tls_ca={security.tls_ca}, tls_client_cert={security.tls_cert}, tls_client_key={security.tls_key} "
            f"cannot be used: {error}"
        ) from error
    return context
