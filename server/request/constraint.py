"""A sample's place in its request's grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        try:
            for token_id in token_ids:
                self._matcher.take(token_id)
            self.allowed_W = self._matcher.allowed(self._end_ids)
        except BaseException as error:  # a library's panic is no Exception
            self._failure = f"{type(error).__name__}: {error}"

    @property
    def is_over(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_over

    @property
    def error(self) -> str:
        """Why nothing can be told of the answer any more; "" if it has not failed."""
        return self._failure or self._matcher.error
