"""How an answer is asked for on the command line: flags that several commands share."""

from dataclasses import dataclass

from ..engine_impl.errors import RefusedError
from ..engine_impl.sampling_params import SamplingParams
from .request import check_max_tokens, sampling_params


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The answer's length and how its tokens are chosen."""

    max_tokens: int = 128
    """Longest answer (tokens)."""

    temperature: float = 0.0
    """Softmax temperature (a factor); 0 is greedy: always the likeliest token."""

    top_k: int = 0
    """Keep the k likeliest tokens (tokens); 0 keeps all."""

    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this probability (0 to 1); 1 keeps all."""

    seed: int | None = None
    """Same seed, same answer (a number below 2^32). Default: drawn anew for every answer."""

    def __post_init__(self) -> None:
        check_max_tokens(self.max_tokens)
        self.sampling()

    def sampling(self) -> SamplingParams:
        """Parameters for one answer."""
        return sampling_params(self.temperature, self.top_k, self.top_p, self.seed)


def check_utf8(text: str, where: str) -> str:
    """The text. Raises RefusedError for one that no tokenizer takes; `where` tells what it is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedError(f"{where}: the text is not valid UTF-8 ({error.reason}); send it as UTF-8") from error
    return text
