"""The ways to say what an answer must look like, and the grammar that each becomes. At most one is given."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...engine_impl.errors import RefusedError
from .grammar import MAX_GRAMMAR, Grammar


def check_one(given: Sequence[str]) -> None:
    """Raises RefusedError for two forms of one answer."""
    if len(given) > 1:
        raise RefusedError(f"{given[0]} and {given[1]} both say what the answer must look like; send one of them")


@dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """Over gRPC a oneof of the same names. Raises RefusedError for two at once."""

    json_schema: str | None = None
    """JSON that this schema describes (JSON)."""

    json_object: bool = False
    """Any JSON object."""

    regex: str | None = None
    """A text that this regular expression matches as a whole."""

    choices: tuple[str, ...] = ()
    """One of these texts."""

    grammar: str | None = None
    """A text of this grammar (Lark as llguidance reads it, or GBNF)."""

    structural_tag: str | None = None
    """Free text with tagged JSON in it (JSON: `structures` of `begin`, `schema`, `end`, and `triggers`)."""

    def __post_init__(self) -> None:
        check_one(self.given)

    @property
    def given(self) -> list[str]:
        """Names."""
        return [one.name for one in fields(self) if getattr(self, one.name) not in (None, False, ())]

    def made(self) -> Grammar | None:
        """None: whatever the model writes. Raises RefusedError."""
        match self.given:
            case ["json_schema"]:
                return Grammar.of_json_schema(read_json("json_schema", self.json_schema or ""))
            case ["json_object"]:
                return Grammar.of_json_object()
            case ["regex"]:
                return Grammar.of_regex(self.regex or "")
            case ["choices"]:
                return Grammar.of_choices(self.choices)
            case ["grammar"]:
                return Grammar.of_lark(self.grammar or "")
            case ["structural_tag"]:
                return structural_tag("structural_tag", read_json("structural_tag", self.structural_tag or ""))
            case _:
                return None


FREE = AnswerForm()
"""Whatever the model writes."""


def read_json(name: str, text: str) -> Any:
    """Raises RefusedError, naming the field."""
    if len(text) > MAX_GRAMMAR:
        raise RefusedError(f"{name} has {len(text)} characters and may have {MAX_GRAMMAR}; send less")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"{name} is no JSON: {error}") from error
    if not isinstance(value, Mapping | bool):
        raise RefusedError(f"{name}={text[:80]} must be a JSON object")
    return value


def structural_tag(name: str, value: Any) -> Grammar:
    """Of {"structures": [{"begin", "schema", "end"}], "triggers": [...]}. Raises RefusedError, naming the field."""
    if isinstance(value, Mapping) and "format" in value:
        raise RefusedError(f"{name}.format is not supported; send structures and triggers")
    try:
        structures = [(one["begin"], one.get("schema", True), one["end"]) for one in value["structures"]]
        triggers = list(value["triggers"])
        if not all(isinstance(text, str) for begin, _, end in structures for text in (begin, end)):
            raise TypeError
        if not all(isinstance(text, str) for text in triggers):
            raise TypeError
    except (KeyError, TypeError, AttributeError) as error:
        raise RefusedError(
            f'{name} must be {{"structures": [{{"begin", "schema", "end"}}, ...], "triggers": [...]}}'
        ) from error
    return Grammar.of_structural_tag(structures, triggers)
