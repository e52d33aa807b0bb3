"""The verbs that the leader calls and the followers replay: declared once, for both.

A verb of the engine's face that works on devices has a line here, and a method of its name in leader.py. Its arguments
go to the followers as they are, keywords too: whatever values.py has a form for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..api import AnyEngine
from .handles import AdapterHandle, Handle, PrefixHandle


class Verb(NamedTuple):
    """How a verb's results are kept."""

    results: tuple[type[Handle] | None, ...]
    """None: the caller gets the result itself; the others are handles"""
    is_quick: bool = True
    """whether it takes no longer than a step: what compiles or reads files does not count against --step-timeout"""


VERBS = {
    "load": Verb((Handle,), is_quick=False),
    "init_decode_state": Verb((Handle,)),
    "warm_up": Verb((Handle,), is_quick=False),
    "read_adapter": Verb((AdapterHandle,), is_quick=False),
    "put_adapter": Verb((Handle,)),
    "without_adapters": Verb((Handle,)),
    "prefill": Verb((PrefixHandle,)),
    "first_tokens": Verb((PrefixHandle, None)),
    "insert": Verb((Handle,)),
    "generate": Verb((Handle, None)),
    "carry": Verb((Handle, None, PrefixHandle)),
}

CHECK, ALIVE, STOP = "check", "alive", "stop"
"""Calls that are no verbs of an engine: compare what both sides are; are you there?; the group's end."""


def functions_of(engine: AnyEngine, load: Callable[[], Any]) -> dict[str, Callable[..., Any]]:
    """What does each verb on this host; `load` reads the parameters."""
    return {name: load if name == "load" else getattr(engine, name) for name in VERBS}


def listed(verb: str, results: Any) -> tuple[Any, ...]:
    """A verb's results, one or several, as VERBS counts them."""
    return (results,) if len(VERBS[verb].results) == 1 else results
