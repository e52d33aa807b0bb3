"""Adapters over real sockets, with a fake engine: an adapter whose path ends with -N counts up by N more."""

import asyncio
import random
import threading
from contextlib import asynccontextmanager

import aiohttp
import grpc
import pytest
from openai import NotFoundError
from slipstream.engine_impl.errors import AdaptersLostError
from slipstream.protos import adapters_pb2 as pb
from slipstream.server.config import AdaptersConfig, SecurityConfig

from tests.fakes import FakeEngine

from ..calls import WAIT_S, answer, failure, sample, text_request, token_request, until
from ..http.serving import serving, url

A = {"prompt": "a", "max_tokens": 4}


def engine_of(**fields):
    return FakeEngine(max_adapters=2, **fields)


@asynccontextmanager
async def served(engine=None, adapters=("one=x-1", "two=x-2"), **config):
    """(Serving, AsyncOpenAI, gRPC channel)"""
    lora = config.pop("lora", AdaptersConfig(adapters=adapters))
    async with (
        serving(engine or engine_of(), lora=lora, **config) as (server, client),
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, client, channel


async def call(channel, method, request, reply, **more):
    """As JetStream's clients do."""
    stub = channel.unary_unary(f"/v1/{method}", type(request).SerializeToString, reply.FromString)
    return await stub(request, timeout=WAIT_S, **more)


async def listed(channel):
    """{name: status}"""
    reply = await call(channel, "models", pb.ListAdaptersRequest(), pb.ListAdaptersResponse)
    assert reply.success
    return {info.adapter_id: info.status for info in reply.adapter_infos}


async def load(channel, name, path, **more):
    request = pb.LoadAdapterRequest(adapter_id=name, adapter_path=path)
    return await call(channel, "load_lora_adapter", request, pb.LoadAdapterResponse, **more)


async def unload(channel, name, **more):
    request = pb.UnloadAdapterRequest(adapter_id=name)
    return await call(channel, "unload_lora_adapter", request, pb.UnloadAdapterResponse, **more)


async def post(server, path, body, token=None, content_type="application/json"):
    """(status, text)"""
    headers = {"content-type": content_type} | ({"authorization": f"Bearer {token}"} if token else {})
    async with aiohttp.ClientSession() as session, session.post(url(server, path), json=body, headers=headers) as reply:
        return reply.status, await reply.text()


def test_requests_name_adapters_over_both_fronts():
    async def scenario():
        async with served() as (_, client, channel):
            named = [(await client.completions.create(model=name, **A)) for name in ("fake", "one", "two")]
            assert [reply.choices[0].text for reply in named] == ["bcde", "cegi", "dgjm"]
            assert [reply.model for reply in named] == ["fake", "one", "two"]
            for name, text in (("", "bcd"), ("one", "ceg"), ("two", "dgj")):
                assert (await answer(channel, text_request("a", lora_adapter_id=name)))[0] == text
            with pytest.raises(NotFoundError, match="'three' is not served; ask for 'fake' or 'one' or 'two'"):
                await client.completions.create(model="three", **A)
            assert (await failure(channel, text_request("a", lora_adapter_id="three"))).code() is (
                grpc.StatusCode.NOT_FOUND
            )
            models = [model async for model in client.models.list()]
            parents = [(model.id, (model.model_extra or {}).get("parent")) for model in models]
            assert parents == [("fake", None), ("one", "fake"), ("two", "fake")]
            assert (await client.models.retrieve("two")).id == "two"
            assert await listed(channel) == {"one": "loaded_hbm", "two": "loaded_hbm"}

    asyncio.run(scenario())


def test_cached_prefixes_are_an_adapters_own():
    """A prompt of a page and a token finds the page where the same adapter has left it."""

    async def scenario():
        async with served(engine_of(page_rows=8)) as (_, client, _):
            cached = []
            for model in ("fake", "fake", "one", "one", "two", "fake"):
                reply = await client.completions.create(model=model, prompt="abcdefghi", max_tokens=1)
                assert reply.usage is not None
                assert reply.usage.prompt_tokens_details is not None
                cached.append(reply.usage.prompt_tokens_details.cached_tokens)
            assert cached == [0, 8, 0, 8, 0, 8]

    asyncio.run(scenario())


def test_more_adapters_than_places_take_turns_on_the_devices():
    """The two that are used stay; a third waits until one of them is not."""

    async def scenario():
        engine = engine_of(max_concurrent_decodes=4, pace=threading.Semaphore(0))
        async with served(engine, ("one=x-1", "two=x-2", "three=x-3")) as (server, _, channel):

            def ask(name, tokens):
                request = token_request([65], tokens, lora_adapter_id=name, ignore_eos=True)
                return asyncio.create_task(answer(channel, request))

            def after_a_step(condition):
                engine.pace.release()
                return condition()

            calls = [ask("one", 55), ask("two", 55)]
            await until(lambda: after_a_step(lambda: server.orchestrator.slots_in_use == 2))
            calls.append(ask("three", 4))
            await until(lambda: after_a_step(lambda: server.orchestrator.queue_depth == 1))
            names = {"max_lora": "2", "running_lora_adapters": "one,two", "waiting_lora_adapters": "three"}
            assert sample(server.metrics, "vllm:lora_requests_info", **names) > 0
            assert (await listed(channel))["three"] == "loaded_cpu"
            engine.pace.release(200)
            tokens = [ids for _, ids, _ in await asyncio.gather(*calls)]
            assert tokens == [
                [65 + (2 + n) * step for step in range(1, count + 1)] for n, count in enumerate((55, 55, 4))
            ]
            assert sum(call.startswith("put_adapter") for call in engine.log) == 3

    asyncio.run(scenario())


def test_an_adapter_that_does_not_come_fails_its_request_alone():
    async def scenario():
        engine, faults = engine_of(), [RuntimeError("no room")]

        def on_call(call):
            if call.startswith("put_adapter") and faults:
                raise faults.pop()

        engine.on_call = on_call
        async with served(engine) as (_, _, channel):
            error = await failure(channel, text_request("a", lora_adapter_id="one"))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert (await answer(channel, text_request("a")))[0] == "bcd"
            assert (await answer(channel, text_request("a", lora_adapter_id="one")))[0] == "ceg"

    asyncio.run(scenario())


def test_a_write_that_loses_the_adapters_fails_who_computes_and_no_one_later():
    async def scenario():
        engine, faults = engine_of(pace=threading.Semaphore(0)), [AdaptersLostError("they are lost")]

        def on_call(call):
            if call == "put_adapter 2" and faults:
                raise faults.pop()

        engine.on_call = on_call
        async with served(engine) as (server, _, channel):
            running = asyncio.create_task(failure(channel, text_request("a", lora_adapter_id="one", max_tokens=40)))
            await until(lambda: server.orchestrator.slots_in_use == 1)
            late = asyncio.create_task(failure(channel, text_request("a", lora_adapter_id="two")))
            engine.pace.release(400)
            errors = await asyncio.gather(running, late)
            assert [error.code() for error in errors] == [grpc.StatusCode.INTERNAL] * 2
            assert (await answer(channel, text_request("a", lora_adapter_id="two")))[0] == "dgj"
            assert (await answer(channel, text_request("a", lora_adapter_id="one")))[0] == "ceg"
            assert engine.log.count("without_adapters") == 1

    asyncio.run(scenario())


def test_callers_load_and_unload(tmp_path):
    for name in ("a-1", "b-2"):
        (tmp_path / name).mkdir()

    async def scenario():
        async with served(lora=AdaptersConfig(adapter_dir=tmp_path)) as (server, client, channel):
            assert (await load(channel, "one", "a-1")).success
            assert await listed(channel) == {"one": "loaded_cpu"}
            refused = await load(channel, "out", "/etc")
            assert not refused.success
            assert "must be a folder below adapter_dir" in refused.error_message
            status, text = await post(server, "/v1/load_lora_adapter", {"lora_name": "two", "lora_path": "b-2"})
            assert (status, text) == (200, "Success: LoRA adapter 'two' added successfully.")
            assert (await client.completions.create(model="two", **A)).choices[0].text == "dgjm"
            assert await listed(channel) == {"one": "loaded_cpu", "two": "loaded_hbm"}
            assert (await unload(channel, "one")).success
            assert "adapter 'one' is not there" in (await unload(channel, "one")).error_message
            assert (await post(server, "/v1/unload_lora_adapter", {"lora_name": "two"}))[0] == 200
            assert (await post(server, "/v1/unload_lora_adapter", {"lora_name": "two"}))[0] == 404
            assert await listed(channel) == {}
            for body in ({"lora_name": "a"}, {"lora_name": 1, "lora_path": "a-1"}, []):
                assert (await post(server, "/v1/load_lora_adapter", body))[0] == 400
            assert (await post(server, "/v1/load_lora_adapter", {}, content_type="text/plain"))[0] == 415

    asyncio.run(scenario())


def test_only_admins_load_where_there_is_a_file_of_them(tmp_path):
    (tmp_path / "a-1").mkdir()
    (tmp_path / "users").write_text("user\n")
    (tmp_path / "admins").write_text("admin\n")
    security = SecurityConfig(auth_token_file=tmp_path / "users", admin_token_file=tmp_path / "admins")
    body = {"lora_name": "one", "lora_path": "a-1"}

    async def scenario():
        lora = AdaptersConfig(adapter_dir=tmp_path)
        async with served(lora=lora, security=security) as (server, _, channel):
            for token, status in ((None, 401), ("user", 403), ("admin", 200)):
                assert (await post(server, "/v1/load_lora_adapter", body, token))[0] == status
            for token, code in (("user", grpc.StatusCode.PERMISSION_DENIED), ("x", grpc.StatusCode.UNAUTHENTICATED)):
                with pytest.raises(grpc.aio.AioRpcError) as told:
                    await unload(channel, "one", metadata=[("authorization", f"Bearer {token}")])
                assert told.value.code() is code
            assert (await unload(channel, "one", metadata=[("authorization", "Bearer admin")])).success

    asyncio.run(scenario())


def test_nobody_loads_into_a_server_without_places():
    async def scenario():
        async with served(FakeEngine(), ()) as (server, client, channel):
            assert "there are no adapters; serve with --max-adapters" in (await load(channel, "a", "x")).error_message
            assert (await post(server, "/v1/unload_lora_adapter", {"lora_name": "a"}))[0] == 400
            assert await listed(channel) == {}
            with pytest.raises(NotFoundError):
                await client.completions.create(model="a", **A)

    asyncio.run(scenario())


def test_a_storm_of_loads_under_traffic_loses_nothing(tmp_path):
    """Every answer is its adapter's, or the adapter was not there; the server is empty at the end."""
    for number in range(6):
        (tmp_path / f"x-{number}").mkdir()

    async def scenario():
        engine = engine_of(max_concurrent_decodes=8, batch=4)
        chance = random.Random(0)
        async with served(engine, lora=AdaptersConfig(adapter_dir=tmp_path)) as (server, _, channel):
            over = asyncio.Event()

            async def churn():
                while not over.is_set():
                    number = chance.randrange(1, 6)
                    await load(channel, f"a{number}", f"x-{number}")
                    await asyncio.sleep(0)
                    await unload(channel, f"a{chance.randrange(1, 6)}")

            async def ask(number):
                tokens = chance.randrange(1, 6)
                request = text_request("A", tokens, lora_adapter_id=f"a{number}" if number else "")
                try:
                    text, *_ = await answer(channel, request)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.NOT_FOUND:
                        raise
                    return False
                assert text == "".join(chr(ord("A") + (number + 1) * step) for step in range(1, tokens + 1))
                return True

            churning = asyncio.create_task(churn())
            answered = []
            for _ in range(12):
                answered += await asyncio.gather(*(ask(chance.randrange(6)) for _ in range(12)))
            over.set()
            await churning
            assert sum(answered) > 30
            assert engine.log.count("put_adapter 1") > 2
            await until(lambda: server.orchestrator.slots_in_use == 0)

    asyncio.run(scenario())
