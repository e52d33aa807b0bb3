"""Whose cached prefixes a request finds, through both fronts of a real server."""

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest
from slipstream.cli.offline import request as offline_request
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub
from slipstream.server.config import SecurityConfig
from slipstream.server.request.options import AnswerOptions

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, sample, text_request, until
from tests.server.http.serving import serving, url

PROMPT = "0" * 40
FOUND = 32
"""Tokens of its full pages, of 16 rows."""


@asynccontextmanager
async def both_fronts(tokens: Path | None = None, *, prefix_cache: bool = True, **security):
    """(server, over gRPC, over HTTP)"""
    engine = FakeEngine(max_prefill_length=64, prefill_chunk=64)
    config = SecurityConfig(auth_token_file=tokens, **security)
    async with (
        serving(engine, security=config, prefix_cache=prefix_cache) as (server, _),
        grpc.aio.insecure_channel(server.address) as channel,
        aiohttp.ClientSession() as session,
    ):

        async def over_grpc(token: str | None = None, salt: str | None = None) -> int:
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            request = text_request(PROMPT, cache_salt=salt)
            call = OrchestratorStub(channel).Decode(request, timeout=WAIT_S, metadata=metadata)
            *_, last = [reply async for reply in call]
            assert last.usage.prompt_tokens == len(PROMPT)
            return last.usage.cached_tokens

        async def over_http(token: str | None = None, salt: str | None = None) -> int:
            body = {"prompt": PROMPT, "max_tokens": 3, "cache_salt": salt}
            headers = {} if token is None else {"Authorization": f"bearer  {token}"}
            async with session.post(url(server, "/v1/completions"), json=body, headers=headers) as answer:
                assert answer.status == 200
                usage = (await answer.json())["usage"]
            assert usage["prompt_tokens"] == len(PROMPT)
            return usage["prompt_tokens_details"]["cached_tokens"]

        yield server, over_grpc, over_http


def written(folder: Path, *tokens: str) -> Path:
    path = folder / "tokens"
    path.write_text("\n".join(tokens))
    return path


def test_both_fronts_share_one_cache_and_its_metrics():
    async def scenario():
        async with both_fronts() as (server, over_grpc, over_http):
            assert [await over_grpc(), await over_http(), await over_grpc("stranger")] == [0, FOUND, FOUND]
            assert sample(server.metrics, "slipstream_prefix_cached_tokens_total") == 2 * FOUND

            def pages():
                return [sample(server.metrics, "slipstream_pages", state=state) for state in ("free", "live", "cached")]

            await until(lambda: pages()[1] == 0)
            free, _, cached = pages()
            assert cached >= FOUND / 16
            assert free + cached == 32

    asyncio.run(scenario())


def test_without_a_prefix_cache_nothing_is_found():
    async def scenario():
        async with both_fronts(prefix_cache=False) as (_, over_grpc, over_http):
            assert [await over_grpc(), await over_http(), await over_grpc()] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_salt_finds_its_own_alone():
    async def scenario():
        async with both_fronts() as (_, over_grpc, over_http):
            assert await over_grpc() == 0
            assert [await over_grpc(salt="s"), await over_http(salt="s")] == [0, FOUND]
            assert [await over_http(salt="t"), await over_grpc(salt="t")] == [0, FOUND]
            assert await over_http() == FOUND

    asyncio.run(scenario())


def test_a_token_finds_its_own_alone(tmp_path):
    """Nor does a salt that is another's token make it that one."""

    async def scenario():
        async with both_fronts(written(tmp_path, "alpha", "beta")) as (_, over_grpc, over_http):
            assert [await over_grpc("alpha"), await over_http("beta")] == [0, 0]
            assert [await over_http("alpha"), await over_grpc("beta")] == [FOUND, FOUND]
            assert [await over_grpc("alpha", "beta"), await over_http("beta", "alpha")] == [0, 0]
            assert [await over_grpc("alpha", "s"), await over_grpc("beta", "s"), await over_http("beta", "s")] == [
                0,
                0,
                FOUND,
            ]

    asyncio.run(scenario())


def test_tokens_come_and_go_and_each_keeps_its_own(tmp_path):
    """One that takes another's line in the file gets nothing of that one's."""

    async def scenario():
        path = written(tmp_path, "alpha")
        async with both_fronts(path) as (_, over_grpc, over_http):
            assert [await over_grpc("alpha"), await over_grpc("alpha")] == [0, FOUND]
            path.write_text("beta\nalpha\n")
            assert [await over_http("beta"), await over_http("alpha")] == [0, FOUND]
            path.write_text("gamma\n")
            assert await over_grpc("gamma") == 0

    asyncio.run(scenario())


def test_tokens_share_where_the_operator_says_so(tmp_path):
    async def scenario():
        async with both_fronts(written(tmp_path, "alpha", "beta"), isolate_prefixes=False) as (_, over_grpc, over_http):
            assert [await over_grpc("alpha"), await over_http("beta")] == [0, FOUND]
            assert [await over_grpc("alpha", "s"), await over_http("beta", "s")] == [0, FOUND]

    asyncio.run(scenario())


@pytest.mark.parametrize("salt", [None, "s"])
def test_offline_there_are_salts_and_no_tokens(salt):
    request = offline_request(0, [1], AnswerOptions(cache_salt=salt), None)  # pyright: ignore[reportArgumentType]
    assert bool(request.prefix_key) == (salt is not None)


def test_the_wire_tells_an_empty_salt_from_none():
    assert not pb.DecodeRequest().HasField("cache_salt")
    assert pb.DecodeRequest.FromString(pb.DecodeRequest(cache_salt="").SerializeToString()).HasField("cache_salt")
