"""Requests over gRPC, at our own method path."""

import asyncio
import time
from typing import Any, Self

import grpc

from ...protos import orchestrator_pb2 as pb
from ...protos.orchestrator_pb2_grpc import OrchestratorStub
from ...server.errors import UnavailableError
from ...server.grpc.channel import PLAIN, ChannelConfig, aio_channel, metadata
from .caller import CONNECT_S, Record
from .workload import LoadRequest


class GrpcCaller:
    """A Caller over one channel. `ignore_eos`: answers go on past the model's stop tokens to their whole length."""

    def __init__(
        self, target: str, timeout_s: float, security: ChannelConfig = PLAIN, *, ignore_eos: bool = False
    ) -> None:
        self._target, self._timeout_s, self._security = target, timeout_s, security
        self._metadata, self._ignore_eos = metadata(security), ignore_eos

    async def __aenter__(self) -> Self:
        self._channel = aio_channel(self._target, self._security)
        self._decode: Any = OrchestratorStub(self._channel).Decode
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError as error:
            await self._channel.close()
            raise UnavailableError(f"nobody answers at {self._target}; `slipstream serve` starts a server") from error
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    def message(self, ask: LoadRequest) -> pb.DecodeRequest:
        """The prompt as it is: no BOS is put before it, so that its length is what the plan says."""
        content = pb.DecodeRequest.TokenContent(token_ids=ask.prompt_ids)
        return pb.DecodeRequest(
            token_content=content, max_tokens=ask.max_tokens, has_bos=True, ignore_eos=self._ignore_eos
        )

    async def call(self, ask: LoadRequest, record: Record) -> None:
        """See Caller. RESOURCE_EXHAUSTED is a rejection, any other status a failure."""
        record.prompt_tokens = len(ask.prompt_ids)
        try:
            async for reply in self._decode(self.message(ask), timeout=self._timeout_s, metadata=self._metadata):
                if token_ids := reply.stream_content.samples[0].token_ids:
                    record.token_times.append(time.perf_counter())
                    record.token_ids += token_ids
                    record.tokens += len(token_ids)
                if reply.HasField("usage"):
                    record.cached_tokens = reply.usage.cached_tokens
                    record.accepted_draft_tokens = reply.usage.accepted_draft_tokens
            record.status = "completed"
        except grpc.aio.AioRpcError as error:
            is_full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            record.status = "rejected" if is_full else "failed"
            record.detail = f"{error.code().name}: {error.details()}"
        record.end = time.perf_counter()
