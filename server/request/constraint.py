"""A sample's place in its request's grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ...engine_impl.api import Matcher


class Constraint:
    """It lives as long as its sample does, whatever slot that has. One thread at a time."""

    def __init__(self, matcher: "Matcher", end_ids: Sequence[int]) -> None:
        """At the answer's beginning. `end_ids`: the tokens that end it."""
        self._matcher, self._end_ids = matcher, end_ids
        self.allowed_W = matcher.allowed(end_ids)
        """u32, which tokens may come next, see `Matcher.allowed`; not while `is_at_work`."""
        self._failure = ""
        self.is_at_work = False
        """Whether tokens were read and what may follow them is not collected yet, the scheduler's note."""

    def take(self, token_ids: Sequence[int]) -> None:
        """The answer goes on with these. Raises nothing: see `error`."""
        if token_ids and not is_set(self.allowed_W, token_ids[0]):
            self._failure = (
                "its grammar allows no token that min_tokens, stop_token_ids, ignore_eos and logit_bias leave; "
                "drop one of them"
            )
            return
        try:
            for token_id in token_ids:
                self._matcher.take(token_id)
            self.allowed_W = self._matcher.allowed(self._end_ids)
        except BaseException as error:  # a library's panic is no Exception
            self._failure = no_end(f"{type(error).__name__}: {error}")

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_over

    @property
    def error(self) -> str:
        """Why nothing can be told of the answer any more, and the remedy; "" if it has not failed."""
        return self._failure or (no_end(self._matcher.error) if self._matcher.error else "")


def no_end(reason: str) -> str:
    return f"its grammar comes to no end: {reason}; send a simpler one"


def is_set(word_W: np.ndarray, token_id: int) -> bool:
    """Whether the token may come, see `Matcher.allowed`."""
    return bool(word_W[token_id // 32] >> np.uint32(token_id % 32) & 1)
