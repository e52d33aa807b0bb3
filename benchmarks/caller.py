"""One request over gRPC, with the times at which its tokens came."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc

from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorStub
from ..server.channel import PLAIN, ChannelConfig, aio_channel, metadata
from ..server.errors import UnavailableError
from .workload import Ask

Status = Literal["completed", "rejected", "failed"]
CONNECT_S = 5.0


@dataclass(kw_only=True)
class Record:
    """What became of a request. Times are seconds of one clock."""

    due: float
    """When it should have been sent: waiting for a busy client counts as latency."""
    token_times: list[float] = field(default_factory=list)
    """One for each message that carried tokens."""
    tokens: int = 0
    end: float = 0.0
    status: Status = "failed"
    detail: str = ""

    @property
    def ttft_ms(self) -> float | None:
        """Until the first token; None of an answer without one."""
        return (self.token_times[0] - self.due) * 1000 if self.token_times else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of the tokens after the first; None when there are none."""
        if self.tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) * 1000 / (self.tokens - 1)

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between messages that carried tokens: what a reader of the stream waits."""
        pairs = zip(self.token_times, self.token_times[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs]

    @property
    def e2e_ms(self) -> float:
        """Until the stream's end."""
        return (self.end - self.due) * 1000


class Caller:
    """`async with Caller(target, timeout_s) as caller:`"""

    def __init__(self, target: str, timeout_s: float, security: ChannelConfig = PLAIN) -> None:
        self._target, self._timeout_s, self._security = target, timeout_s, security
        self._metadata = metadata(security)

    async def __aenter__(self) -> "Caller":
        """Raises UnavailableError when nobody answers at the target."""
        self._channel = aio_channel(self._target, self._security)
        self._stub = OrchestratorStub(self._channel)
        try:
            await asyncio.wait_for(self._channel.channel_ready(), CONNECT_S)
        except TimeoutError as error:
            await self._channel.close()
            raise UnavailableError(f"nobody answers at {self._target}; `slipstream serve` starts a server") from error
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()

    async def call(self, ask: Ask, due: float) -> Record:
        """Sends it now and reads its answer to the end. A refusal is a result, not an error."""
        record = Record(due=due)
        content = pb.DecodeRequest.TokenContent(token_ids=ask.prompt_ids)
        request = pb.DecodeRequest(token_content=content, max_tokens=ask.max_tokens)
        replies: Any = self._stub.Decode(request, timeout=self._timeout_s, metadata=self._metadata)
        try:
            async for reply in replies:
                if tokens := len(reply.stream_content.samples[0].token_ids):
                    record.token_times.append(time.perf_counter())
                    record.tokens += tokens
            record.status = "completed"
        except grpc.aio.AioRpcError as error:
            is_full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            record.status, record.detail = (
                "rejected" if is_full else "failed",
                f"{error.code().name}: {error.details()}",
            )
        record.end = time.perf_counter()
        return record
