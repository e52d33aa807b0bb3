"""Whose cached prefixes a request may find, through both fronts of a real server."""

import asyncio
import json
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

from tests.server.calls import WAIT_S, text_request
from tests.server.http.serving import serving, url


@asynccontextmanager
async def keys_of(tokens: Path | None = None, **security):
    """(over_grpc, over_http): each asks with a token and a salt, and returns the request's prefix key."""
    async with (
        serving(security=SecurityConfig(auth_token_file=tokens, **security)) as (server, _),
        grpc.aio.insecure_channel(server.address) as channel,
        aiohttp.ClientSession() as session,
    ):
        keys, submit = [], server.orchestrator.submit

        def seen(*requests):
            keys.extend(request.prefix_key for request in requests)
            submit(*requests)

        server.orchestrator.submit = seen

        async def over_grpc(token: str | None = None, salt: str | None = None) -> str:
            metadata = [] if token is None else [("authorization", f"Bearer {token}")]
            request = text_request("a", cache_salt=salt)
            async for _ in OrchestratorStub(channel).Decode(request, timeout=WAIT_S, metadata=metadata):
                pass
            return keys.pop()

        async def over_http(token: str | None = None, salt: str | None = None, path: str = "completions") -> str:
            body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "cache_salt": salt}
            headers = {} if token is None else {"Authorization": f"bearer  {token}"}
            async with session.post(url(server, f"/v1/{path}"), data=json.dumps(body), headers=headers) as answer:
                assert answer.status == 200
            return keys.pop()

        yield over_grpc, over_http


def written(folder: Path, *tokens: str) -> Path:
    path = folder / "tokens"
    path.write_text("\n".join(tokens))
    return path


def test_without_tokens_the_salt_alone_tells_requests_apart():
    async def scenario():
        async with keys_of() as (over_grpc, over_http):
            assert {await over_grpc(), await over_http(), await over_grpc("stranger")} == {""}
            salted = {
                await over_grpc(salt="s"),
                await over_http(salt="s"),
                await over_http(None, "s", "chat/completions"),
            }
            assert len(salted) == 1, "one cache behind both fronts"
            assert len({"", *salted, await over_http(salt="t")}) == 3

    asyncio.run(scenario())


def test_a_token_shares_with_itself_alone(tmp_path):
    async def scenario():
        async with keys_of(written(tmp_path, "alpha", "beta")) as (over_grpc, over_http):
            alpha, beta = await over_grpc("alpha"), await over_http("beta")
            assert await over_http("alpha") == alpha
            others = [await over_grpc("alpha", "s"), await over_grpc("beta", "s"), await over_grpc("alpha", "beta")]
            assert len({"", alpha, beta, *others}) == 6
            assert not any(token in key for key in (alpha, beta, *others) for token in ("alpha", "beta"))

    asyncio.run(scenario())


def test_a_token_keeps_its_prefixes_when_others_come_and_go(tmp_path):
    """Nor does one that takes another's line in the file get that one's prefixes."""

    async def scenario():
        path = written(tmp_path, "alpha")
        async with keys_of(path) as (over_grpc, _):
            alone = await over_grpc("alpha")
            path.write_text("beta\nalpha\n")
            assert await over_grpc("alpha") == alone
            beside = await over_grpc("beta")
            path.write_text("gamma\n")
            assert len({"", alone, beside, await over_grpc("gamma")}) == 4

    asyncio.run(scenario())


def test_tokens_share_where_the_operator_says_so(tmp_path):
    async def scenario():
        async with keys_of(written(tmp_path, "alpha", "beta"), isolate_prefixes=False) as (over_grpc, over_http):
            assert {await over_grpc("alpha"), await over_http("beta")} == {""}
            assert await over_grpc("alpha", "s") == await over_http("beta", "s") != ""

    asyncio.run(scenario())


@pytest.mark.parametrize("salt", [None, "s"])
def test_offline_there_are_salts_and_no_tokens(salt):
    request = offline_request(0, [1], AnswerOptions(cache_salt=salt), None)  # pyright: ignore[reportArgumentType]
    assert bool(request.prefix_key) == (salt is not None)


def test_the_wire_tells_an_empty_salt_from_none():
    assert not pb.DecodeRequest().HasField("cache_salt")
    assert pb.DecodeRequest.FromString(pb.DecodeRequest(cache_salt="").SerializeToString()).HasField("cache_salt")
