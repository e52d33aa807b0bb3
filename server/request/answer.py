"""An answer that grows by events, and what is shown of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dialects.parts import CallPart, joined
from .events import Event, TokenLogprob, Usage


@dataclass(kw_only=True)
class SampleText:
    """One sample of an answer."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallPart, ...] = ()
    """Of tools, each in one piece."""
    shown: str = ""
    """All of it for reading, in the order in which it came."""
    finish_reason: str | None = None
    """Set when it is whole."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One a token, if asked for."""

    def as_json(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"token_ids": self.token_ids, "text": self.text, "finish_reason": self.finish_reason}
        if self.reasoning:
            parts["reasoning_content"] = self.reasoning
        if self.calls:
            parts["tool_calls"] = [
                {"id": call.id, "name": call.name, "arguments": call.arguments} for call in self.calls
            ]
        if self.logprobs:
            parts["logprobs"] = [logprob_as_json(token) for token in self.logprobs]
        return parts

    def grow(self, event: Event) -> None:
        self.token_ids += event.token_ids
        self._show(event)
        self.text += event.text
        self.reasoning += event.reasoning
        self.calls = joined(self.calls + event.calls)
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason.value

    def _show(self, event: Event) -> None:
        self.shown += event.reasoning
        if event.text and self.reasoning + event.reasoning and not self.text:
            self.shown += "\n\n"
        self.shown += event.text
        for call in event.calls:
            if call.name:
                self.shown += ("\n" if self.shown else "") + f"[calls {call.name}] "
            self.shown += call.arguments


@dataclass(kw_only=True)
class Answer:
    """All samples of one request."""

    samples: list[SampleText]
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    """One for each token of the prompt, if asked for; the first is 0 by definition."""
    usage: Usage | None = None
    """Set when all are whole."""

    @classmethod
    def of(cls, num_samples: int) -> "Answer":
        """Nothing yet."""
        return cls(samples=[SampleText() for _ in range(num_samples)])

    def grow(self, event: Event) -> None:
        """Raises the error that the request ended with."""
        if event.error is not None:
            raise event.error
        self.samples[event.index].grow(event)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.usage = event.usage or self.usage

    def as_json(self) -> dict[str, Any]:
        """One sample's parts lie open, those of several under "samples"; what nobody asked for is left out."""
        parts: dict[str, Any] = {}
        if len(self.samples) == 1:
            parts |= self.samples[0].as_json()
        else:
            parts["samples"] = [sample.as_json() for sample in self.samples]
        if self.prompt_logprobs is not None:
            parts["prompt_logprobs"] = [None, *(_of_prompt(token) for token in self.prompt_logprobs[1:])]
        if self.usage is not None:
            parts |= {
                "cached_tokens": self.usage.cached_tokens,
                "ttft_ms": self.usage.ttft_ms,
                "total_ms": self.usage.total_ms,
            }
            if self.usage.accepted_draft_tokens or self.usage.rejected_draft_tokens:
                parts["accepted_draft_tokens"] = self.usage.accepted_draft_tokens
                parts["rejected_draft_tokens"] = self.usage.rejected_draft_tokens
        return parts


def _of_prompt(token: TokenLogprob) -> float | dict[str, Any]:
    """The number alone where no others were asked for."""
    return logprob_as_json(token) if token.top else token.logprob


def logprob_as_json(token: TokenLogprob) -> dict[str, Any]:
    parts: dict[str, Any] = {"logprob": token.logprob}
    if token.top:
        parts["top"] = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in token.top]
    return parts


def logprob_lines(answer: Answer) -> list[str]:
    """What was asked for of the prompt's and the samples' log-probabilities, for reading; token ids, not texts."""
    lines = []
    if answer.prompt_logprobs is not None:
        lines.append("prompt: - " + " ".join(f"{token.logprob:.3f}" for token in answer.prompt_logprobs[1:]))
        lines += [
            f"prompt token {position}: {token.logprob:.3f}{_likeliest(token)}"
            for position, token in enumerate(answer.prompt_logprobs)
            if token.top
        ]
    for number, sample in enumerate(answer.samples):
        for token_id, token in zip(sample.token_ids, sample.logprobs, strict=False):
            name = f"sample {number}, " if len(answer.samples) > 1 else ""
            lines.append(f"{name}token {token_id}: {token.logprob:.3f}{_likeliest(token)}")
    return lines


def _likeliest(token: TokenLogprob) -> str:
    top = "".join(f"  {other} {logprob:.3f}" for other, logprob in token.top)
    return f"  likeliest:{top}" if top else ""
