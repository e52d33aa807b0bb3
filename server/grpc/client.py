"""A gRPC client of our own server, for the commands that ask it."""

from collections.abc import Generator
from types import TracebackType

import grpc

from ...engine_impl.errors import RefusedError
from ...protos import orchestrator_pb2 as pb
from ...protos.orchestrator_pb2_grpc import OrchestratorStub
from ..errors import UnavailableError
from ..request.chat import ChatCall
from ..request.events import Event
from ..request.form import FREE, AnswerForm
from ..request.options import AnswerOptions
from .channel import PLAIN, ChannelConfig, channel, metadata
from .messages import read_reply, write_chat, write_form, write_options

Pieces = Generator[Event, None, None]
"""An answer as it comes; the last event has the usage."""


class CallError(UnavailableError):
    """The server did not answer, or broke off."""


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

    def ask_text(self, text: str, options: AnswerOptions, form: AnswerForm = FREE) -> Pieces:
        """Continues raw text."""
        return self._decode(pb.DecodeRequest(text_content=pb.DecodeRequest.TextContent(text=text)), options, form)

    def ask_chat(self, call: ChatCall, options: AnswerOptions, form: AnswerForm = FREE) -> Pieces:
        """Answers a conversation."""
        request = pb.DecodeRequest(messages=pb.DecodeRequest.Chat())
        write_chat(request.messages, call)
        return self._decode(request, options, form)

    def _decode(self, request: pb.DecodeRequest, options: AnswerOptions, form: AnswerForm) -> Pieces:
        """Closing the iterator cancels the call. Raises RefusedError for a bad request, CallError for the rest."""
        try:
            write_options(request, options)
            write_form(request, form)
        except ValueError as error:  # protobuf's: a number beyond 32 bits
            raise RefusedError(str(error)) from error
        call = self._stub.Decode(request, metadata=self._metadata)
        try:
            for reply in call:
                yield from read_reply(reply)
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
