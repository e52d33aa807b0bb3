"""The flags of `slipstream serve`: the fields of its dataclasses by name, for whoever reads them from elsewhere than a
command line."""

from collections.abc import Collection
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from ..engine_impl.errors import RefusedError


def flags_of(command: type) -> dict[str, Any]:
    """The flags of a dataclass and of those in its fields: by name, without dashes, what they take."""
    found: dict[str, Any] = {}
    for field, kind in kinds_of(command):
        if is_dataclass(kind) and isinstance(kind, type):
            found |= flags_of(kind)
        else:
            name, found[name] = flag_of(field, kind)
    return found


def kinds_of(command: type) -> list[tuple[Field[Any], Any]]:
    """A dataclass's fields, each with its type and what is noted with it."""
    hints = get_type_hints(command, include_extras=True)
    return [(field, hints[field.name]) for field in fields(command)]


def flag_of(field: Field[Any], kind: Any) -> tuple[str, Any]:
    """A field's flag, and what it takes."""
    kind, *notes = get_args(kind) if hasattr(kind, "__metadata__") else [kind]
    name = next((note.name for note in notes if getattr(note, "name", None)), field.name)
    return name.replace("_", "-"), kind


def check_name(name: str, flags: Collection[str], where: str) -> None:
    """Raises RefusedError, which names the nearest flag."""
    if name in flags:
        return
    near = get_close_matches(name.replace("_", "-").removeprefix("no-"), flags, n=1, cutoff=0.5)
    nearest = f"; the nearest is {near[0]}" if near else ""
    raise RefusedError(f"{where}: {name[:80]!r} is no flag of `slipstream serve`{nearest}")
