"""A real Ray cluster on this machine: replicas of the embedded model behind Serve's own proxies."""

import asyncio
import os
import signal
import time
from collections import Counter

import aiohttp
import grpc
import openai
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from tests.server.ray.cluster import Cluster, cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1500)]

START_S = 600
"""Imports, loading and compiling on a busy machine (seconds)."""
PROMPT = "The capital of France is"
BEGINNING = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 9


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    # A short path: Ray puts Unix sockets below it.
    with cluster(tmp_path_factory.mktemp("r")) as made:
        asyncio.run(ready(made))
        yield made


async def until(cluster: Cluster, condition, within_s=START_S):
    deadline = time.monotonic() + within_s
    while not condition():
        assert cluster.is_up, cluster.log[-3000:]
        assert time.monotonic() < deadline, cluster.log[-3000:]
        await asyncio.sleep(0.2)


async def ready(cluster: Cluster):
    deadline = time.monotonic() + START_S
    async with aiohttp.ClientSession() as session:
        while True:
            assert cluster.is_up, cluster.log[-3000:]
            assert time.monotonic() < deadline, cluster.log[-3000:]
            try:
                async with session.get(f"{cluster.http}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)


def client_of(cluster: Cluster):
    return openai.AsyncOpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0, timeout=120)


def options(max_tokens):
    return {"model": "", "temperature": 0, "max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}


async def streamed(client, prompt, max_tokens):
    """The texts of an answer's chunks."""
    stream = await client.completions.create(prompt=prompt, stream=True, **options(max_tokens))
    return [chunk.choices[0].text async for chunk in stream]


def test_both_proxies_stream_the_same_answer(ray):
    async def run():
        async with client_of(ray) as client, grpc.aio.insecure_channel(ray.grpc) as channel:
            over_http = await streamed(client, PROMPT, 20)
            text = pb.DecodeRequest.TextContent(text=PROMPT)
            call = OrchestratorStub(channel).Decode(
                pb.DecodeRequest(text_content=text, max_tokens=20, ignore_eos=True), timeout=120
            )
            replies = [reply async for reply in call]
            assert "".join(reply.stream_content.samples[0].text for reply in replies) == "".join(over_http)
            assert min(len(over_http), len(replies)) > 5
            whole = await client.completions.create(prompt=PROMPT, **options(20))
            assert whole.choices[0].text == "".join(over_http)

    asyncio.run(run())


def test_refusals_have_the_fronts_own_words(ray):
    async def run():
        async with client_of(ray) as client, grpc.aio.insecure_channel(ray.grpc) as channel:
            with pytest.raises(openai.BadRequestError, match="temperature=-1"):
                await client.completions.create(model="", prompt="a", temperature=-1)
            text = pb.DecodeRequest.TextContent(text="a")
            with pytest.raises(grpc.aio.AioRpcError, match="temperature=-1") as caught:
                await OrchestratorStub(channel).Decode(pb.DecodeRequest(text_content=text, temperature=-1)).read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "FailedCallError" not in ray.log

    asyncio.run(run())


def test_whoever_leaves_has_the_answer_cancelled(ray):
    async def run():
        async with client_of(ray) as client, grpc.aio.insecure_channel(ray.grpc) as channel:
            before = ray.log.count("outcome=cancelled")
            stream = await client.completions.create(prompt=PROMPT, stream=True, **options(240))
            await anext(stream)
            await stream.close()
            await until(ray, lambda: ray.log.count("outcome=cancelled") == before + 1, 30)
            text = pb.DecodeRequest.TextContent(text=PROMPT)
            call = OrchestratorStub(channel).Decode(
                pb.DecodeRequest(text_content=text, max_tokens=240, ignore_eos=True)
            )
            await call.read()
            call.cancel()
            await until(ray, lambda: ray.log.count("outcome=cancelled") == before + 2, 30)

    asyncio.run(run())


class Load:
    """So many answers under way at once, one after the other, until it is left; `outcomes` counts how they ended."""

    def __init__(self, cluster: Cluster, streams: int) -> None:
        self.outcomes, self._cluster, self._streams, self._over = Counter[str](), cluster, streams, False

    async def __aenter__(self) -> "Load":
        self._session = aiohttp.ClientSession(self._cluster.http)
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._streams)]
        return self

    async def __aexit__(self, *exc_info) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def _run(self, number: int) -> None:
        while not self._over:
            self.outcomes[await self._ask(f"Number {number}:")] += 1

    async def _ask(self, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 40, "ignore_eos": True, "temperature": 0, "stream": True}
        try:
            async with self._session.post("/v1/completions", json=body) as answer:
                text = await answer.text()
        except aiohttp.ClientError:
            return "cut"
        return "ok" if text.endswith("[DONE]\n\n") else f"{answer.status} {text}"


def test_replicas_come_with_the_load_are_replaced_when_they_die_and_go_again(ray):
    async def run():
        await until(ray, lambda: len(ray.replicas()) == 1)
        (first,) = ray.replicas()
        async with Load(ray, 8) as load:
            second = await newcomer(ray, {first})
            assert load.outcomes.keys() == {"ok"}  # nobody notices that there are more

            os.kill(first, signal.SIGKILL)
            await newcomer(ray, {first, second})
            broken = load.outcomes.total() - load.outcomes["ok"]
            assert 1 <= broken <= 8  # those that it was answering
            answered = load.outcomes["ok"]
            await until(ray, lambda: load.outcomes["ok"] > answered + 8)
        assert load.outcomes.total() - load.outcomes["ok"] == broken
        assert all(outcome in ("ok", "cut") or "no replica answers" in outcome for outcome in load.outcomes)
        await until(ray, lambda: len(ray.replicas()) == 1, 120)
        async with client_of(ray) as client:
            assert await streamed(client, PROMPT, 5)

    asyncio.run(run())


async def newcomer(cluster: Cluster, known: set[int]) -> int:
    """A replica's process that has come, and answers."""
    await until(cluster, lambda: cluster.replicas() - known)
    (pid,) = cluster.replicas() - known
    await until(cluster, lambda: "request ended" in of_process(cluster, pid))
    return pid


def of_process(cluster: Cluster, pid: int) -> str:
    """What a process has logged."""
    return "\n".join(line for line in cluster.log.split("\n") if f"pid={pid})" in line)


def test_prompts_that_begin_alike_go_to_one_replica(ray):
    """Among two, by turns they would not find each other's pages."""

    async def run():
        await until(ray, lambda: len(ray.replicas()) == 1)
        async with client_of(ray) as client, Load(ray, 8) as load:
            await newcomer(ray, ray.replicas())
            cached = []
            for number in range(4):
                whole = await client.completions.create(prompt=f"{BEGINNING}{number}", **options(1))
                assert whole.usage is not None
                assert whole.usage.prompt_tokens_details is not None
                cached.append(whole.usage.prompt_tokens_details.cached_tokens or 0)
            assert cached[0] == 0
            assert min(cached[1:]) >= 128
            assert load.outcomes.keys() == {"ok"}

    asyncio.run(run())
