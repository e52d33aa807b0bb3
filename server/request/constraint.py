"""A sample's place in its request's grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ...engine_impl.api import Matcher

AHEAD = 16
"""Tokens that are looked at behind the last one that was read, at most, while each is the only one that may come
(count): two of the widest steps."""


class Constraint:
    """It lives as long as its sample does, whatever slot that has. One thread at a time."""

    def __init__(self, matcher: "Matcher", end_ids: Sequence[int]) -> None:
        """At the answer's beginning. `end_ids`: the tokens that end it."""
        self._matcher, self._end_ids = matcher, end_ids
        self._ahead = list[int]()
        """What the matcher has taken before it was read: nothing else can come."""
        self._allowed = [matcher.allowed(end_ids)]
        """What may come in the place of each of these, and behind the last, unless the text is over there."""
        self._failure = ""
        self.is_at_work = False
        """Whether tokens were read and what may follow them is not collected yet, the scheduler's note."""
        self.take(())

    @property
    def allowed_W(self) -> np.ndarray:
        """u32, which tokens may come next, see `Matcher.allowed`; not while `is_at_work`."""
        return self._allowed[0]

    @property
    def forced(self) -> list[int]:
        """The next tokens, as far as no others may come and the answer goes on behind them; not while `is_at_work`."""
        return self._ahead[: len(self._allowed) - 1]

    @property
    def allowed_behind_W(self) -> np.ndarray:
        """u32, which tokens may come behind these."""
        return self._allowed[-1]

    def take(self, token_ids: Sequence[int]) -> None:
        """The answer goes on with these. Raises nothing: see `error`."""
        if self._failure:
            return
        try:
            if all(self._takes(token_id) for token_id in token_ids):
                self._look_ahead()
            else:
                self._failure = (
                    "its grammar allows no token that min_tokens, stop_token_ids, ignore_eos and logit_bias leave; "
                    "drop one of them"
                )
        except BaseException as error:  # a library's panic is no Exception
            self._failure = no_end(f"{type(error).__name__}: {error}")

    def _takes(self, token_id: int) -> bool:
        """Whether it may come."""
        if not self._allowed:
            self._allowed = [self._matcher.allowed(self._end_ids)]
        if not is_set(self._allowed.pop(0), token_id):
            return False
        if self._ahead:
            del self._ahead[0]
        else:
            self._matcher.take(token_id)
        return True

    def _look_ahead(self) -> None:
        """Takes what must come, up to where others may, or the text is over."""
        if not self._allowed and not self._ahead:
            self._allowed = [self._matcher.allowed(self._end_ids)]
        while len(self._ahead) < min(AHEAD, len(self._allowed)) and not self._matcher.error:
            token_id = only(self._allowed[-1])
            if token_id is None or token_id in self._end_ids:
                return
            self._matcher.take(token_id)
            self._ahead.append(token_id)
            allowed_W = self._matcher.allowed(self._end_ids)
            if not self._matcher.is_over and not self._matcher.error:
                self._allowed.append(allowed_W)

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_over and not self._ahead

    @property
    def error(self) -> str:
        """Why nothing can be told of the answer any more, and the remedy; "" if it has not failed."""
        return self._failure or (no_end(self._matcher.error) if self._matcher.error and not self._ahead else "")


def no_end(reason: str) -> str:
    return f"its grammar comes to no end: {reason}; send a simpler one"


def is_set(word_W: np.ndarray, token_id: int) -> bool:
    """Whether the token may come, see `Matcher.allowed`."""
    return bool(word_W[token_id // 32] >> np.uint32(token_id % 32) & 1)


def only(word_W: np.ndarray) -> int | None:
    """The one token that may come, see `Matcher.allowed`; None: none, or several."""
    (at_N,) = word_W.nonzero()
    if len(at_N) != 1:
        return None
    word = int(word_W[at_N[0]])
    return None if word & (word - 1) else int(at_N[0]) * 32 + word.bit_length() - 1
