"""What a request may ask for beside its prompt, declared once: here, and in SamplingParams what the engine does."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from ...engine_impl.errors import RefusedError
from ...engine_impl.option import Option, Text, Texts, at_least, between, check_options, option, options_of
from ...engine_impl.sampling.params import MAX_LOGPROBS, SamplingParams

MAX_PRIORITY = 10
"""Priorities go from minus this to this: bounded, so that waiting beats any of them in the end."""

MAX_PREDICTION = 1 << 20
"""Longest prediction (characters)."""

GREEDY = SamplingParams()


@dataclass(eq=False, kw_only=True)
class AnswerOptions:
    """The answer's length, how its tokens are chosen, where it stops, and what is told about it."""

    max_tokens: int = option(128, at_least(1))
    """Longest answer (tokens)."""

    sampling: SamplingParams = GREEDY

    stop_strings: tuple[str, ...] = option((), Texts(at_most=16, longest=256))
    """End the answer before one of these texts."""

    num_samples: int = option(1, at_least(1))
    """Answers to one prompt, each with a slot of its own; more than one need a temperature to differ."""

    prompt_logprobs: bool = option(False)
    """Tell the log-probability of each token of the prompt."""

    prompt_top_logprobs: int = option(0, between(0, MAX_LOGPROBS, means={0: "none"}))
    """Tell those of the prompt's tokens, and in each one's place those of the k likeliest (tokens)."""

    priority: int = option(
        0, between(-MAX_PRIORITY, MAX_PRIORITY, means={-MAX_PRIORITY: "last", MAX_PRIORITY: "first"})
    )
    """Higher goes first where requests wait; a level is worth 5 seconds of waiting."""

    cache_salt: str | None = option(None, Text(longest=256))
    """Share cached prefixes only with requests of the same salt, so that nobody else can tell by the time to the first
    token what was asked."""

    prediction: str | None = option(None, Text(longest=MAX_PREDICTION))
    """What the answer will probably be, or a text that it keeps most of: a server that speculates answers sooner then.
    It changes no token, but where the cache is int8 a near tie may fall the other way."""

    def __post_init__(self) -> None:
        check_options(self, AnswerOptions)
        if self.sampling.min_tokens > self.max_tokens:
            raise RefusedError(
                f"min_tokens={self.sampling.min_tokens} must be at most max_tokens={self.max_tokens}; "
                "ask for fewer, or for a longer answer"
            )

    @classmethod
    def of(cls, **values: Any) -> "AnswerOptions":
        """From OPTIONS by their names. Raises RefusedError for what no server takes."""
        sampling = {one.name: values.pop(one.name) for one in options_of(SamplingParams) if one.name in values}
        return cls(sampling=SamplingParams(**sampling), **values)

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens in the place of each of the prompt's; None: nothing is asked for there."""
        return self.prompt_top_logprobs if self.prompt_logprobs or self.prompt_top_logprobs else None

    def values(self) -> Iterator[tuple[Option, Any]]:
        """Of all OPTIONS."""
        for one in OPTIONS:
            yield one, getattr(self if one in options_of(AnswerOptions) else self.sampling, one.name)

    def fields(self) -> dict[str, Any]:
        """What a Request takes from here."""
        return {one.name: getattr(self, one.name) for one in fields(AnswerOptions)}

    def check_one_sample(self, command: str) -> None:
        """Raises RefusedError: `command` has room for one answer."""
        if self.num_samples != 1:
            raise RefusedError(
                f"num_samples={self.num_samples} must be 1: {command} shows one answer; `slipstream ask` shows several"
            )


OPTIONS = options_of(AnswerOptions)[:1] + options_of(SamplingParams) + options_of(AnswerOptions)[1:]
"""All of a request's, in the order in which help and docs list them."""


def check_utf8(text: str, where: str) -> str:
    """The text. Raises RefusedError for one that no tokenizer takes; `where` tells what it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{where}: the text is not valid UTF-8 ({error.reason}); send it as UTF-8") from error
    return text
