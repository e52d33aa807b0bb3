"""How an option of a request is declared: once, as a field of a dataclass, with a docstring.

    min_p: float = option(0.0, between(0, 1, low="keep all tokens"), device="float32")
    \"""Drop tokens below this share of the likeliest one's probability.\"""

Checks, device arrays, the wire, the HTTP bodies, the command line's flags and the docs are made from what options_of()
tells, or compared with it by a test.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Protocol

from .errors import RefusedError

ENDLESS = float("inf")
LARGEST = 1.7976931348623157e308
"""Of all floats that are finite."""
MAX_TOKEN_ID = 2**31 - 1
"""No token id is beyond it: arrays of them are i32."""


class Allowed(Protocol):
    """Which values an option takes."""

    @property
    def text(self) -> str:
        """For people, as in "must be from 0 to 1"."""
        ...

    def check(self, name: str, value: Any) -> None:
        """Raises RefusedError, naming the value and the limit."""
        ...


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included unless `is_above`: then `low` is not. NaN is none of them."""

    low: float
    high: float
    text: str
    is_above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.is_above else self.low <= value) and value <= self.high

    def check(self, name: str, value: float) -> None:
        if not self.holds(value):
            raise RefusedError(f"{name}={value} must be {self.text}")


def between(low: float, high: float, *, means: Mapping[float, str] | None = None) -> Range:
    """`means`: what the ends stand for, said in parentheses."""
    ends = [f"{end} ({means[end]})" if means and end in means else str(end) for end in (low, high)]
    return Range(low, high, f"from {ends[0]} to {ends[1]}")


def at_least(low: float) -> Range:
    return Range(low, ENDLESS, f"at least {low}")


@dataclass(frozen=True)
class Texts:
    """A few texts, none of them empty (characters)."""

    at_most: int
    longest: int

    @property
    def text(self) -> str:
        return f"up to {self.at_most} texts of 1 to {self.longest} characters"

    def check(self, name: str, value: Sequence[str]) -> None:
        check_count("", words(name), value, self.at_most)
        for one in value:
            if not 0 < len(one) <= self.longest:
                raise RefusedError(
                    f"a {words(name)[:-1]} of {len(one)} characters must have from 1 to {self.longest}: {one[:40]!r}"
                )


@dataclass(frozen=True)
class Text:
    """One text, not empty (characters). A refusal does not repeat it: it may be a secret."""

    longest: int

    @property
    def text(self) -> str:
        return f"a text of 1 to {self.longest} characters"

    def check(self, name: str, value: str) -> None:
        if not 0 < len(value) <= self.longest:
            raise RefusedError(f"{name}: {len(value)} characters, must be {self.text}")


@dataclass(frozen=True)
class TokenIds:
    """A few token ids. Whether a vocabulary has them is not known here."""

    at_most: int

    @property
    def text(self) -> str:
        return f"up to {self.at_most} token ids"

    def check(self, name: str, value: Sequence[int]) -> None:
        check_count("", words(name), value, self.at_most)
        for token_id in value:
            if not 0 <= token_id <= MAX_TOKEN_ID:
                raise RefusedError(f"{words(name)[:-1]} {token_id} must be from 0 to {MAX_TOKEN_ID}")


@dataclass(frozen=True)
class ByToken:
    """A number for each of some token ids."""

    at_most: int
    numbers: Range

    @property
    def text(self) -> str:
        return f"up to {self.at_most} token ids, each with a number {self.numbers.text}"

    def check(self, name: str, value: Mapping[int, float]) -> None:
        check_count(f"{name}: ", "token ids", value, self.at_most)
        for token_id, number in value.items():
            if not 0 <= token_id <= MAX_TOKEN_ID:
                raise RefusedError(f"{name}: token id {token_id} must be from 0 to {MAX_TOKEN_ID}")
            self.numbers.check(f"{name}[{token_id}]", number)


def check_count(where: str, what: str, values: Sequence[Any] | Mapping[Any, Any], at_most: int) -> None:
    """Raises RefusedError."""
    if len(values) > at_most:
        raise RefusedError(f"{where}{len(values)} {what} are too many; send at most {at_most}")


def words(name: str) -> str:
    """stop_token_ids -> stop token ids"""
    return name.replace("_", " ")


@dataclass(frozen=True)
class PaddedRows:
    """On the device: arrays of one length, whatever the request has. A tuple fills one, a mapping two."""

    length: int
    dtypes: tuple[str, ...]
    """Of each array; the first has token ids."""


@dataclass(frozen=True)
class Declared:
    """What a field's metadata say of an option."""

    allowed: Allowed | None
    device: str | PaddedRows | None
    absent: int


def option(
    default: Any, allowed: Allowed | None = None, *, device: str | PaddedRows | None = None, absent: int = 0
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: of the command line and the wire; None is "left out", and allowed.
        allowed: which values; None takes any of its type.
        device: how it lies on the device, for one slot: a scalar's dtype, or PaddedRows. None does not travel there.
        absent: what the device has for None.
    """
    declared = {"option": Declared(allowed, device, absent)}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=declared)
    return field(default=default, metadata=declared)


@dataclass(frozen=True)
class Option:
    """One of options_of()."""

    name: str
    kind: Any
    """its type, as annotated"""
    default: Any
    allowed: Allowed | None
    device: str | PaddedRows | None
    absent: int
    doc: Callable[[], str]
    """Its docstring as one line."""

    @property
    def collect(self) -> Callable[[Any], Any]:
        """Makes of what a front has read, such as a list, what the option holds."""
        return type(self.default) if isinstance(self.default, (tuple, dict)) else lambda value: value

    def check(self, value: Any) -> None:
        """Raises RefusedError."""
        if self.allowed is None or (value is None and self.default is None):
            return
        try:
            self.allowed.check(self.name, value)
        except RefusedError as error:
            raise RefusedError(f"{error}, or left out") if self.default is None else error from None


@cache
def options_of(declares: type) -> tuple[Option, ...]:
    """The options that a dataclass declares, in their order."""
    return tuple(
        Option(
            one.name,
            one.type,
            one.default if one.default_factory is MISSING else one.default_factory(),
            declared.allowed,
            declared.device,
            declared.absent,
            lambda name=one.name: docstrings(declares)[name],
        )
        for one in fields(declares)
        if (declared := one.metadata.get("option"))
    )


def check_options(values: Any, declares: type) -> None:
    """Raises RefusedError for the first option of `values`, an object with all of them, that is out of bounds."""
    for one in options_of(declares):
        one.check(getattr(values, one.name))


@cache
def docstrings(declares: type) -> dict[str, str]:
    """By field: the string that stands below it, as one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(declares))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[statement.target.id] = " ".join(str(below.value.value).split())
    return found
