"""A schema's arguments in FunctionGemma's form, which is no JSON, as rules of Lark."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..dialects.gemma import QUOTE
from .grammar import literal

GENERIC = r"""
object: "{" (pair ("," pair)*)? "}"
pair: KEY ":" value
value: text | NUMBER | "true" | "false" | "null" | object | list
list: "[" (value ("," value)*)? "]"
KEY: /[A-Za-z0-9_.-]{1,64}/
NUMBER: /-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?/
INTEGER: /-?(0|[1-9][0-9]{0,14})/
"""
"""Arguments of any kind."""

KINDS = {"string": "text", "number": "NUMBER", "integer": "INTEGER", "boolean": '("true" | "false")', "null": '"null"'}
NAMING = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated"}
"""Keys that narrow nothing."""
HELD = {
    "type", "enum", "const", "anyOf", "oneOf", "properties", "required", "additionalProperties", "items", "minItems",
    "maxItems",
}  # fmt: skip
"""Keys that the rules hold to."""
MAX_ITEMS = 64
"""Bounds of lists up to here are held to (count)."""


class Arguments:
    """The rules of one grammar's objects, and what of their schemas they do not hold to."""

    def __init__(self, quote: str) -> None:
        """`quote`: what stands around a text, as Lark writes it."""
        self._quote = quote
        self.rules: list[str] = []
        self.unheld: set[str] = set()
        """Keys of schemas: what they say is left to the model."""

    def of(self, schema: Mapping[str, Any]) -> str:
        """An expression for an object of this schema."""
        return self._value({"type": "object"} | dict(schema))

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            return "value"
        self.unheld |= set(schema) - HELD - NAMING
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            if values and all(is_said(value) for value in values):
                return one_of(self._said(value) for value in values)
            self.unheld |= {"const", "enum"} & set(schema)
            return "value"
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return one_of(self._value(inner) for inner in schema[key])
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        return one_of(self._of_kind(str(kind), schema) for kind in kinds) if kinds else "value"

    def _of_kind(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "array":
            return self._list(schema)
        if kind == "object":
            return self._object(schema)
        return KINDS.get(kind, "value")

    def _said(self, value: Any) -> str:
        if isinstance(value, str):
            return " ".join(["(" + self._quote, *([literal(value)] if value else []), self._quote + ")"])
        return literal(json.dumps(value))

    def _list(self, schema: Mapping[str, Any]) -> str:
        item = self._value(schema.get("items"))
        least, most = schema.get("minItems", 0), schema.get("maxItems", MAX_ITEMS)
        if not (isinstance(least, int) and isinstance(most, int) and 0 <= least <= most <= MAX_ITEMS):
            self.unheld |= {"minItems", "maxItems"} & set(schema)
            least, most = 0, MAX_ITEMS
        if not most:
            return '("[" "]")'
        filled = f'{item} ("," {item}){{{max(least - 1, 0)},{most - 1}}}'
        return f'("[" {filled} "]")' if least else f'("[" ({filled})? "]")'

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Its properties in the schema's order, and others behind them where it allows some."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        named = [str(name) for name in required] if isinstance(required, list) else []
        if not isinstance(properties, Mapping) or not is_written(properties) or not {*named} <= {*properties}:
            self.unheld |= {"properties", "required"} & set(schema)
            return "object"
        more = schema.get("additionalProperties", not properties)
        if isinstance(more, Mapping):
            self.unheld.add("additionalProperties")
        if not properties:
            return "object" if more else '("{" "}")'
        others = ' ("," pair)*' if more else ""
        rest = f"rest_{len(self.rules)}"
        self.rules.append(f"{rest}:{others or ' ' + EMPTY}")
        first = '(pair ("," pair)*)?' if more else EMPTY
        for name, inner in reversed([*properties.items()]):
            own = f"{literal(name + ':')} {self._value(inner)}"
            is_sure = name in named
            first = f"{own} {rest}" if is_sure else f"({own} {rest} | {first})"
            longer = f"rest_{len(self.rules)}"
            self.rules.append(f'{longer}: ("," {own}){"" if is_sure else "?"} {rest}')
            rest = longer
            begun = f"first_{len(self.rules)}"
            self.rules.append(f"{begun}: {first}")
            first = begun
        return f'("{{" {first} "}}")'


EMPTY = '""'


def is_said(value: Any) -> bool:
    """Whether it is a value alone, which no mark of the form is in."""
    return QUOTE not in value if isinstance(value, str) else isinstance(value, int | float | None)


def one_of(choices: Any) -> str:
    """Without those that are there twice."""
    choices = list(dict.fromkeys(choices))
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def is_written(names: Collection[str]) -> bool:
    """Whether the form has a way to write them."""
    return all(re.fullmatch(r"[^:{}\[\],\s<>]{1,64}", name) for name in names)
