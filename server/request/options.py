"""How an answer is asked for on the command line: flags that several commands share."""

from dataclasses import dataclass
from typing import Any

import tyro

from ...engine_impl.errors import RefusedError
from ...engine_impl.sampling.params import SamplingParams
from .request import check_max_tokens, check_num_samples, check_priority, check_stops, drawn_seed


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The answer's length, how its tokens are chosen, where it stops, and what is told about it."""

    max_tokens: int = 128
    """Longest answer (tokens)."""

    temperature: float = 0.0
    """Softmax temperature (a factor); 0 is greedy: always the likeliest token."""

    top_k: int = 0
    """Keep the k likeliest tokens (tokens); 0 keeps all."""

    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this probability (0 to 1); 1 keeps all."""

    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability (0 to 1); 0 keeps all."""

    seed: int | None = None
    """Same seed, same answer (a number below 2^32). Default: drawn anew for every answer."""

    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely (a factor on their logits); 1 is none."""

    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has (-2 to 2); 0 is none."""

    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it (-2 to 2); 0 is none."""

    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End the answer before this text; may be given several times."""

    stop_token_id: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """End the answer before this token (an id); may be given several times."""

    ignore_eos: bool = False
    """Go on past the model's own end, to max_tokens."""

    num_samples: int = 1
    """Answers to one prompt, each with a slot of its own (answers); more than one need a temperature to differ."""

    logprobs: int | None = None
    """Tell each token's log-probability and those of the k likeliest (tokens, 0 to 20). Default: nothing."""

    prompt_logprobs: bool = False
    """Tell the log-probability of each token of the prompt."""

    priority: int = 0
    """Higher goes first (-10 to 10) where requests wait; a level is worth 5 seconds of waiting."""

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        check_stops(self.stop, self.stop_token_id)
        check_num_samples(self.num_samples)
        check_priority(self.priority)
        self.sampling()

    def sampling(self) -> SamplingParams:
        """Parameters for one answer."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=drawn_seed(self.temperature, self.seed),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=self.logprobs,
        )

    def check_one_sample(self, command: str) -> None:
        """Raises RefusedError: `command` has room for one answer."""
        if self.num_samples != 1:
            raise RefusedError(
                f"num_samples={self.num_samples} must be 1: {command} shows one answer; `slipstream ask` shows several"
            )

    def request_fields(self) -> dict[str, Any]:
        """What a Request needs beside its prompt and its caller."""
        return {
            "max_tokens": self.max_tokens,
            "sampling": self.sampling(),
            "stop_strings": self.stop,
            "stop_token_ids": self.stop_token_id,
            "ignore_eos": self.ignore_eos,
            "num_samples": self.num_samples,
            "prompt_logprobs": self.prompt_logprobs,
            "priority": self.priority,
        }


def check_utf8(text: str, where: str) -> str:
    """The text. Raises RefusedError for one that no tokenizer takes; `where` tells what it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{where}: the text is not valid UTF-8 ({error.reason}); send it as UTF-8") from error
    return text
