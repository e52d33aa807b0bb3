"""How a request wants its tokens chosen. Plain numbers: the wire and the command line build it without JAX."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..option import LARGEST, ByToken, PaddedRows, Range, TokenIds, between, check_options, option

MAX_SEED = 2**32 - 1
MAX_TOP_K = 2**31 - 1

MAX_LOGPROBS = 20
"""P: most alternatives whose log-probability a request may ask for, a token."""

MAX_STOP_TOKEN_IDS = 16
"""Stop token ids of one request, the model's own not counted."""
MAX_MODEL_STOP_IDS = 16
"""Of a model's own there is room on the device for so many."""
MAX_BIASES = 300
"""Entries of one request's logit_bias, as OpenAI has it."""
MAX_MIN_TOKENS = 2**30
"""Added to a position in a text it is an i32 still."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Per-request sampling; the defaults are greedy decoding.

    In this order: logit_bias on the model's logits, penalties, min_tokens, temperature, top_k, top_p, min_p. The first
    three also move greedy tokens. Raises RefusedError for what is out of bounds.
    """

    temperature: float = option(0.0, Range(0, LARGEST, "0 (greedy) or a positive number"), device="float32")
    """Softmax temperature (a factor); 0 is greedy: always the likeliest token."""

    top_k: int = option(0, between(0, MAX_TOP_K, means={0: "keep all tokens"}), device="int32")
    """Keep the k likeliest tokens (tokens); 0 keeps all."""

    top_p: float = option(
        1.0, between(0, 1, means={0: "keep the likeliest alone", 1: "keep all tokens"}), device="float32"
    )
    """Keep the likeliest tokens that together hold this probability; 1 keeps all, 0 the likeliest alone."""

    min_p: float = option(0.0, between(0, 1, means={0: "keep all tokens"}), device="float32")
    """Drop tokens below this share of the likeliest one's probability; 0 keeps all."""

    seed: int | None = option(None, between(0, MAX_SEED), device="uint32")
    """Same seed, prompt and parameters: same answer, whatever else runs beside. Default: drawn for each request."""

    repetition_penalty: float = option(1.0, Range(0, LARGEST, "positive (1 is none)", is_above=True), device="float32")
    """Divides the positive and multiplies the negative logits of tokens of the prompt and the answer (a factor; Keskar
    et al., arXiv 1909.05858); 1 is none."""

    presence_penalty: float = option(0.0, between(-2, 2), device="float32")
    """Taken from the logits of tokens that the answer has; 0 is none."""

    frequency_penalty: float = option(0.0, between(-2, 2), device="float32")
    """Taken from a token's logit for each time that the answer has it; 0 is none."""

    logit_bias: Mapping[int, float] = option(
        {}, ByToken(MAX_BIASES, between(-100, 100)), device=PaddedRows(MAX_BIASES, ("int32", "float32"))
    )
    """Added to the logits of these tokens (by id): -100 as good as forbids one, 100 as good as forces it."""

    min_tokens: int = option(0, between(0, MAX_MIN_TOKENS), device="int32")
    """The answer's least length (tokens), at most max_tokens. Before it no token that would end the answer is chosen,
    and no stop string looked for."""

    stop_token_ids: tuple[int, ...] = option(
        (), TokenIds(MAX_STOP_TOKEN_IDS), device=PaddedRows(MAX_STOP_TOKEN_IDS + MAX_MODEL_STOP_IDS, ("int32",))
    )
    """End the answer before one of these tokens (ids), as before the model's own."""

    ignore_eos: bool = option(False)
    """Go on past the model's own end, to max_tokens: its stop tokens are tokens like others."""

    logprobs: int | None = option(
        None, between(0, MAX_LOGPROBS, means={0: "the chosen token's alone"}), device="int32", absent=-1
    )
    """Tell each token's log-probability under the model itself, and those of the k likeliest (tokens)."""

    def __post_init__(self) -> None:
        check_options(self, SamplingParams)


GREEDY = SamplingParams()
"""What is asked where nothing is."""
