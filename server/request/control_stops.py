"""Stop strings that name a control token: an answer's text never shows one, so it is met as a token."""

from dataclasses import replace
from typing import TYPE_CHECKING

from .options import AnswerOptions

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer


def with_control_stops(options: AnswerOptions, tokenizer: "Tokenizer") -> AnswerOptions:
    """The options with such stop strings as stop token ids, unless they end every answer anyway.

    Raises RefusedError for too many stop token ids.
    """
    named = {text: token_id for text in options.stop_strings if (token_id := tokenizer.control_id(text)) is not None}
    if not named:
        return options
    sampling = options.sampling
    known = () if sampling.ignore_eos else tokenizer.stop_ids
    added = [token_id for token_id in named.values() if token_id not in (*known, *sampling.stop_token_ids)]
    return replace(
        options,
        stop_strings=tuple(text for text in options.stop_strings if text not in named),
        sampling=replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *added)),
    )
