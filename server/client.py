"""A gRPC client of our own server, for the commands that ask it."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import TracebackType

import grpc

from ..engine_impl.errors import RefusedError
from ..engine_impl.sampling_params import SamplingParams
from ..protos import orchestrator_pb2 as pb
from ..protos.orchestrator_pb2_grpc import OrchestratorStub
from .channel import PLAIN, ChannelConfig, channel, metadata
from .errors import UnavailableError

REASONS = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class CallError(UnavailableError):
    """The server did not answer, or broke off."""


@dataclass(frozen=True)
class Piece:
    """What one message adds to an answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    """"stop" or "length" in the last piece."""


Pieces = Generator[Piece, None, None]


class Client:
    """`with Client(target) as client:`"""

    def __init__(self, target: str, security: ChannelConfig = PLAIN) -> None:
        self._target, self._metadata = target, metadata(security)
        self._channel = channel(target, security)
        self._stub = OrchestratorStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._channel.close()

    def ask_text(self, text: str, max_tokens: int, sampling: SamplingParams) -> Pieces:
        """Continues raw text."""
        request = pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text))
        return self._decode(request, max_tokens, sampling)

    def ask_chat(self, messages: Sequence[dict[str, str]], max_tokens: int, sampling: SamplingParams) -> Pieces:
        """Answers a conversation of {"role", "content"}."""
        turns = [pb.DecodeRequest.Message(**message) for message in messages]
        return self._decode(pb.DecodeRequest(messages=pb.DecodeRequest.Chat(messages=turns)), max_tokens, sampling)

    def _decode(self, request: pb.DecodeRequest, max_tokens: int, sampling: SamplingParams) -> Pieces:
        """Closing the iterator cancels the call. Raises RefusedError for a bad request, CallError for the rest."""
        request.max_tokens = max_tokens
        request.temperature, request.top_k, request.top_p = sampling.temperature, sampling.top_k, sampling.top_p
        request.seed = sampling.seed
        call = self._stub.Decode(request, metadata=self._metadata)
        try:
            for reply in call:
                sample = reply.stream_content.samples[0]
                yield Piece(sample.text, tuple(sample.token_ids), REASONS.get(sample.finish_reason))
        except grpc.RpcError as error:
            raise self._translated(error) from error
        finally:
            call.cancel()

    def _translated(self, error: grpc.RpcError) -> Exception:
        code, details = error.code(), error.details() or ""  # pyright: ignore[reportAttributeAccessIssue]
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return RefusedError(details)
        if code is grpc.StatusCode.UNAVAILABLE:
            if "failed to connect" in details:
                return CallError(f"nobody answers at {self._target}; `slipstream serve` starts a server")
            return CallError(f"{self._target} is not available: {details}")
        return CallError(f"{self._target} answered {code.name}: {details}")
