"""A call passes from an ingress to the fronts of a replica and back, as it came and as it is answered."""

import asyncio
import json
import logging

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb

from tests.fakes import FakeEngine
from tests.server.calls import text_request, until

JSON = {"content-type": "application/json"}


def completion(**fields):
    return json.dumps({"prompt": "a", "max_tokens": 3, **fields}).encode()


def post(ingress, handles, body, **more):
    return handles.ask(ingress, "POST", "/v1/completions", body, JSON | more)


class Context:
    """Serve's RayServegRPCContext, as far as an ingress knows it."""

    def __init__(self, *metadata: tuple[str, str], peer: str = "ipv4:192.0.2.7:5000") -> None:
        self._metadata, self._peer = list(metadata), peer
        self.code, self.details, self.trailing = None, None, [("request_id", "from-serve")]

    def invocation_metadata(self):
        return self._metadata

    def trailing_metadata(self):
        return self.trailing

    def peer(self):
        return self._peer

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details

    def set_trailing_metadata(self, trailing):
        self.trailing = [self.trailing[0], *trailing]  # as Serve does


async def decoded(ingress, request, context):
    """Text, of each message."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    replies = [pb.DecodeResponse.FromString(one.SerializeToString()) async for one in ingress.Decode(data, context)]
    return [reply.stream_content.samples[0].text for reply in replies]


def test_an_answer_over_http_in_one_piece_and_streamed(handles):
    async def run():
        async with handles.served(FakeEngine(step_s=0.01)) as (ingress, handle, _):
            status, headers, body = await post(ingress, handles, completion())
            assert (status, json.loads(b"".join(body))["choices"][0]["text"]) == (200, "bcd")
            assert headers["content-type"].startswith("application/json")
            status, headers, parts = await post(ingress, handles, completion(stream=True, max_tokens=8))
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            assert len(parts) > 3  # it streams
            events = [line[6:] for line in b"".join(parts).decode().split("\n\n") if line]
            assert events.pop() == "[DONE]"
            assert "".join(json.loads(one)["choices"][0]["text"] for one in events) == "bcdefghi"
            assert all(answer.cancelled for answer in handle.answers[1:])  # no effect on one that has ended

    asyncio.run(run())


def test_what_the_connection_has_ends_with_it_and_the_rest_goes_through(handles):
    async def run():
        async with handles.served() as (ingress, handle, _):
            more = {
                "connection": "keep-alive, x",
                "x-forwarded-for": "1.2.3.4",
                "x-mine": "1",
                "expect": "100-continue",
            }
            _, headers, body = await handles.ask(ingress, "POST", "/v1/completions?a=%20", completion(), JSON | more)
            (call,) = handle.calls
            assert call.target == "/v1/completions?a=%20"
            assert dict(call.headers) == {
                "host": "a.example", "x-request-id": "from-serve", "x-mine": "1", "x-forwarded-for": "192.0.2.7", **JSON
            }  # fmt: skip
            assert json.loads(b"".join(body))["id"] == "cmpl-from-serve"
            assert headers.keys() == {"content-type", "content-length"}  # what Serve adds itself comes from Serve

    asyncio.run(run())


def test_bytes_that_no_url_may_have_go_through_in_percent_encoding(handles):
    async def run():
        async with handles.served() as (ingress, handle, _):
            status, _, _ = await handles.ask(ingress, "GET", "/v1/models?a=é%20&b=[1]|+")
            assert (status, handle.calls[0].target) == (200, "/v1/models?a=%C3%A9%20&b=[1]|+")

    asyncio.run(run())


def test_an_application_below_a_path(handles):
    async def run():
        async with handles.served() as (ingress, handle, _):
            status, _, _ = await handles.ask(ingress, "GET", "/llm/v1/models", root="/llm")
            assert (status, handle.calls[0].target) == (200, "/v1/models")

    asyncio.run(run())


def test_refusals_are_the_fronts_own(handles):
    async def run():
        async with handles.served(**{"max-message-bytes": 100}) as (ingress, handle, _):
            status, _, body = await post(ingress, handles, completion(temperature=-1))
            assert status == 400
            assert "temperature=-1.0 must be" in json.loads(b"".join(body))["error"]["message"]
            status, _, body = await post(ingress, handles, completion(prompt="a" * 100_000))
            assert (status, len(handle.calls[-1].body)) == (413, 101)
            assert "max_message_bytes=100" in json.loads(b"".join(body))["error"]["message"]
            status, _, _ = await handles.ask(ingress, "GET", "/nowhere")
            assert status == 404

    asyncio.run(run())


def test_a_body_that_does_not_come(handles, monkeypatch):
    monkeypatch.setattr("slipstream.server.ray.ingress.BODY_S", 0.01)

    async def run():
        async with handles.served() as (ingress, handle, _):
            never = asyncio.Event()
            monkeypatch.setattr("starlette.requests.Request.stream", lambda self: (_ async for _ in waits(never)))
            status, _, body = await post(ingress, handles, b"")
            assert (status, handle.calls) == (408, [])
            assert "error" in json.loads(b"".join(body))

    async def waits(event):
        await event.wait()
        yield b""

    asyncio.run(run())


def test_whoever_leaves_has_the_work_cancelled(handles):
    async def run():
        async with handles.served(FakeEngine(step_s=0.01)) as (ingress, handle, fronts):
            task = asyncio.create_task(post(ingress, handles, completion(prompt="\x01", max_tokens=100, stream=True)))
            await until(lambda: fronts.orchestrator.in_work)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert handle.answers[0].cancelled  # which has Serve close the replica's generator
            await handle.answers[0].closed()
            await until(lambda: not fronts.orchestrator.in_work)

            call = ingress.Decode(text_request("\x01", max_tokens=100).SerializeToString(), Context())
            await anext(call)
            assert fronts.orchestrator.in_work
            await call.aclose()
            await handle.answers[1].closed()
            await until(lambda: not fronts.orchestrator.in_work)

    asyncio.run(run())


def test_an_answer_over_grpc(handles):
    async def run():
        async with handles.served() as (ingress, handle, _):
            context = Context(("x-mine", "1"), ("user-agent", "a"), ("grpc-accept-encoding", "gzip"))
            assert "".join(await decoded(ingress, text_request("a"), context)) == "bcd"
            assert (context.code, dict(context.trailing)["x-request-id"]) == (None, "from-serve")
            assert handle.calls[0].metadata == (
                ("x-mine", "1"), ("x-request-id", "from-serve"), ("x-forwarded-for", "192.0.2.7")
            )  # fmt: skip
            named = Context(("x-request-id", "mine"))
            await decoded(ingress, text_request("a"), named)
            assert dict(named.trailing)["x-request-id"] == "mine"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (text_request("a", temperature=-1), grpc.StatusCode.INVALID_ARGUMENT, "temperature=-1"),
        (b"\xff", grpc.StatusCode.INVALID_ARGUMENT, "these 1 bytes are no"),
    ],
    ids=["option", "bytes"],
)
def test_a_grpc_call_that_is_refused_has_the_fronts_status(handles, request_, code, details):
    async def run():
        async with handles.served() as (ingress, _, _):
            context = Context()
            with pytest.raises(Exception, match=details) as caught:
                await decoded(ingress, request_, context)
            assert context.code == code
            record = logging.LogRecord(
                "ray.serve", logging.ERROR, "", 0, "", (), (type(caught.value), caught.value, None)
            )
            assert not logging.getLogger("ray.serve").filter(record)

    asyncio.run(run())


def test_serves_log_keeps_other_failures(handles):
    async def run():
        async with handles.served():
            record = logging.LogRecord("ray.serve", logging.ERROR, "", 0, "", (), (ValueError, ValueError(), None))
            assert logging.getLogger("ray.serve").filter(record)
            assert logging.getLogger("ray.serve").filter(logging.LogRecord("ray.serve", 0, "", 0, "", (), None))

    asyncio.run(run())


def test_health_needs_no_token(handles, tmp_path):
    (tmp_path / "tokens").write_text("secret\n")
    (tmp_path / "tokens").chmod(0o600)

    async def run():
        async with handles.served(**{"auth-token-file": str(tmp_path / "tokens")}) as (ingress, _, _):
            reply = await ingress.HealthCheck(b"", Context())
            assert pb.HealthCheckResponse.FromString(reply.SerializeToString()).is_live
            assert (await ingress.Check(b"", Context())).SerializeToString() == b"\x08\x01"  # SERVING
            assert (await handles.ask(ingress, "GET", "/health"))[0] == 200
            assert (await post(ingress, handles, completion()))[0] == 401
            long = completion(prompt="a" * 10)
            assert (await post(ingress, handles, long, authorization="Bearer secret"))[0] == 200
            refused = Context()
            with pytest.raises(Exception, match="known token"):
                await decoded(ingress, text_request("a"), refused)
            assert refused.code == grpc.StatusCode.UNAUTHENTICATED
            assert await decoded(ingress, text_request("a"), Context(("authorization", "Bearer secret")))

    asyncio.run(run())


def test_prompts_of_two_tokens_are_routed_apart_as_their_caches_are(handles, tmp_path):
    (tmp_path / "tokens").write_text("a\nb\n")
    (tmp_path / "tokens").chmod(0o600)

    async def chains(**args):
        handle = handles.Handle(Dead())
        ingress = handles.ingress_of(handle, **args)
        for token in ("a", "b"):
            await post(ingress, handles, completion(prompt="x" * 600), authorization=f"Bearer {token}")
            with pytest.raises(Exception, match="no replica answers"):
                await decoded(ingress, text_request("x" * 600), Context(("authorization", f"Bearer {token}")))
        return [call.chain for call in handle.calls]

    async def run():
        assert len(set(await chains(**{"auth-token-file": str(tmp_path / "tokens")}))) == 4
        shared = {"auth-token-file": str(tmp_path / "tokens"), "isolate-prefixes": False}
        assert [len(set(await chains(**args))) for args in (shared, {})] == [2, 2]

    asyncio.run(run())


class Dead:
    """A replica whose process has gone."""

    def __init__(self, after=()):
        self._after = after

    async def http(self, call):
        from ray.exceptions import ActorDiedError

        for part in self._after:
            yield part
        raise ActorDiedError()

    grpc = http


def test_a_replica_that_has_died_is_told_as_unavailable(handles):
    async def run():
        ingress = handles.ingress_of(handles.Handle(Dead()))
        status, _, body = await post(ingress, handles, completion())
        assert (status, json.loads(b"".join(body))["error"]["code"]) == (503, "unavailable")
        _, _, body = await handles.ask(ingress, "POST", "/v1/messages", b"{}", JSON)
        assert json.loads(b"".join(body))["type"] == "error"  # as Anthropic's clients read it
        context = Context()
        with pytest.raises(Exception, match="no replica answers"):
            await decoded(ingress, text_request("a"), context)
        assert context.code == grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_a_replica_that_dies_under_an_answer_breaks_it_off(handles):
    from ray.exceptions import ActorDiedError

    async def run():
        from slipstream.server.ray.calls import HttpHead

        ingress = handles.ingress_of(handles.Handle(Dead([HttpHead(200, ()), b"data"])))
        with pytest.raises(ActorDiedError):
            await post(ingress, handles, completion())

    asyncio.run(run())
