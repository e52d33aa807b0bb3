"""What the bench commands share: flags of one type, lists in a word, how a command ends."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import tyro

from ...engine_impl.errors import RefusedError

JsonFlag = Annotated[bool, tyro.conf.arg(name="json")]
Dtype = Literal["auto", "float32", "bfloat16"]
Platform = Literal["auto", "cpu", "tpu", "cuda"]


def finish(result: dict[str, Any], as_json: bool) -> int:
    """The benchmark has printed its table."""
    if as_json:
        print(json.dumps(result), flush=True)
    return 0


def check_positive(name: str, value: float | None) -> None:
    """Raises RefusedError unless it is None or above 0."""
    if value is not None and value <= 0:
        raise RefusedError(f"{name}={value} must be at least 1")


def integers(name: str, text: str) -> list[int]:
    """ "1,8" -> [1, 8], each at least 1. Raises RefusedError."""
    return [int(value) for value in numbers(name, text, kind=int)]


def numbers(name: str, text: str, kind: Callable[[str], float] = float) -> list[float]:
    """ "0.5,8" -> [0.5, 8.0], each above 0. Raises RefusedError."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < float("inf") for value in values):
        raise RefusedError(f"{name}={text!r} must be positive numbers with commas between them, such as 1,8,32")
    return values


def words(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """ "float32,bfloat16" -> a list. Raises RefusedError for a word that is not known."""
    values = text.split(",")
    if unknown := [value for value in values if value not in known]:
        raise RefusedError(f"{name}={unknown[0]!r} is not known; those that are: {', '.join(known)}")
    return values
