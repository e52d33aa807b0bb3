"""Callers who leave, by whatever way and at any stage."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from slipstream.protos import orchestrator_pb2 as pb
from slipstream.protos.orchestrator_pb2_grpc import OrchestratorStub

from tests.fakes import FakeEngine
from tests.server.calls import WAIT_S, answer, outcomes, serving, text_request, until


@pytest.mark.parametrize("way", ["cancel", "disconnect", "deadline"])
def test_a_client_that_leaves_frees_its_slot(way):
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, step_s=0.002)
        async with serving(engine) as (server, channel):
            own = grpc.aio.insecure_channel(server.address)
            call = OrchestratorStub(own).Decode(text_request("A", 200), timeout=0.1 if way == "deadline" else WAIT_S)
            await call.read()
            assert server.orchestrator.slots_in_use == 1
            if way == "cancel":
                call.cancel()
            elif way == "disconnect":
                await own.close()
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await answer(channel, text_request("a")))[0] == "bcd"
            await own.close()

    asyncio.run(scenario())


def test_a_queued_request_that_is_cancelled_is_never_prefilled():
    async def scenario():
        engine = FakeEngine(max_concurrent_decodes=1, pace=threading.Semaphore(0))
        async with serving(engine) as (server, channel):
            first = OrchestratorStub(channel).Decode(text_request("a"), timeout=WAIT_S)
            await first.read()
            queued = OrchestratorStub(channel).Decode(text_request("A"), timeout=WAIT_S)
            reading = asyncio.ensure_future(queued.read())
            await until(lambda: server.orchestrator.queue_depth == 1)
            queued.cancel()
            await until(lambda: server.orchestrator.queue_depth == 0)
            engine.pace.release(99)
            assert (await answer(channel, text_request("B")))[0] == "CDE"
            assert "prefill A" not in engine.log
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(scenario())


@pytest.mark.parametrize(("way", "outcome"), [("cancel", "cancelled"), ("disconnect", "cancelled"), ("deadline",) * 2])
@pytest.mark.parametrize("stage", ["queued", "prefilling", "decoding"])
def test_a_client_that_leaves_at_any_stage_is_counted_and_frees_what_it_held(stage, way, outcome):
    async def scenario():
        may_prefill = threading.Event()
        engine = FakeEngine(max_concurrent_decodes=2, step_s=0.002)
        async with serving(engine) as (server, channel):
            running, expected = None, {outcome: 1.0}
            if stage == "queued":
                engine.pace = threading.Semaphore(0)
                running = asyncio.create_task(answer(channel, text_request("a", 5, num_samples=2)))
                await until(lambda: server.orchestrator.slots_in_use == 2)
            if stage == "prefilling":
                engine.on_prefill = lambda prompt: may_prefill.wait(WAIT_S)
            own = grpc.aio.insecure_channel(server.address)
            request = text_request("\x01", 120, num_samples=2)
            call = OrchestratorStub(own).Decode(request, timeout=0.2 if way == "deadline" else WAIT_S)
            reading = asyncio.ensure_future(call.read())
            if stage == "decoding":
                await reading
            elif stage == "prefilling":
                await until(lambda: "prefill \x01" in engine.log)
            else:
                await until(lambda: server.orchestrator.queue_depth == 1)
            if way == "cancel":
                call.cancel()
            elif way == "disconnect":
                await own.close()
            await until(lambda: outcomes(server) == {outcome: 1.0})
            may_prefill.set()
            if running is not None:
                assert server.orchestrator.queue_depth == 0
                engine.pace.release(99)
                await running
                expected["ok"] = 1.0
                assert "prefill \x01" not in engine.log
            await until(lambda: server.orchestrator.slots_in_use == 0)
            assert (await answer(channel, text_request("a")))[0] == "bcd"
            assert outcomes(server) == {**expected, "ok": expected.get("ok", 0.0) + 1}
            await asyncio.gather(reading, return_exceptions=True)
            await own.close()

    asyncio.run(scenario())


def test_a_server_that_sees_the_deadline_first_says_so():
    """Without a client whose own clock ends the call: the last message, then the status."""

    async def scenario():
        engine = FakeEngine(step_s=0.005)
        async with serving(engine) as (server, _):
            context = cast(
                Any,
                SimpleNamespace(time_remaining=lambda: 0.1, invocation_metadata=lambda: (), written=[], aborted=[]),
            )

            async def note(*args, **more):
                return None

            async def write(reply):
                context.written.append(reply)

            async def abort(code, details, trailing_metadata):
                context.aborted.append((code, details))

            context.send_initial_metadata, context.write, context.abort = note, write, abort
            context.peer = lambda: "ipv4:127.0.0.1:5000"
            await server.doors.grpc.Decode(text_request("\x01", 200).SerializeToString(), context)
            last = context.written[-1]
            assert last.stream_content.samples[0].finish_reason == pb.FINISH_REASON_DEADLINE
            assert 0 < last.usage.generated_tokens < 60
            ((code, details),) = context.aborted
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert f"passed after {last.usage.generated_tokens} tokens" in details

    asyncio.run(scenario())
