"""What an answer must look like: a grammar, made from what a caller sent. It is compiled elsewhere."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine_impl.errors import RefusedError

MAX_GRAMMAR = 1 << 17
"""A grammar's text at most (characters)."""
MAX_DEPTH = 64
"""How deep a schema's objects and lists may lie within each other (levels)."""
MAX_CHOICES = 1000
"""Texts that an answer is chosen from (count)."""
MAX_TAGS = 128
"""Of a structural tag (count)."""

WHITESPACE = r"(\n[ \t]{0,32}| )"
"""Between two tokens of JSON there is nothing, a space, or a new line with its indentation: as people and programs
write it. Without a bound a model could write blanks for ever."""

COMPILER_KEY = "x-guidance"
"""In a schema it would set the compiler's options, which are ours."""

Schema = Mapping[str, Any] | bool


@dataclass(frozen=True)
class Grammar:
    """One answer's form. Equal ones have equal texts.

    Raises RefusedError for a text that is too long. Whether it can be compiled is not known here.
    """

    text: str
    """What llguidance takes: {"grammars": [{"lark_grammar" or "json_schema": ...}]}."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR:
            raise RefusedError(
                f"the grammar has {len(self.text)} characters and may have {MAX_GRAMMAR}; "
                "send a smaller schema or grammar"
            )

    @classmethod
    def of_json_schema(cls, schema: Schema) -> "Grammar":
        """JSON that a schema describes. Raises RefusedError for one that nests too deep or holds no JSON values."""
        return cls(f'{{"grammars": [{{"json_schema": {bounded_json(schema)}}}]}}')

    @classmethod
    def of_json_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.of_json_schema({"type": "object"})

    @classmethod
    def of_regex(cls, regex: str) -> "Grammar":
        """A text that a regular expression matches as a whole; look-around and back references are not known."""
        if not regex:
            raise RefusedError("the regex is empty; send one that matches some text")
        return cls.of_lark(f"start: {regex_literal(regex)}")

    @classmethod
    def of_choices(cls, choices: Sequence[str]) -> "Grammar":
        """One of some texts."""
        if not 0 < len(choices) <= MAX_CHOICES:
            raise RefusedError(f"{len(choices)} choices must be from 1 to {MAX_CHOICES}")
        if not all(choices):
            raise RefusedError("a choice is empty; each must be a text of at least one character")
        return cls.of_lark("start: " + " | ".join(map(literal, choices)))

    @classmethod
    def of_lark(cls, lark: str) -> "Grammar":
        """A grammar in llguidance's form of Lark, whose first rule is `start`; `%json {...}` is a schema within it, see
        `bounded_json`. One in GBNF, where rules are written `root ::= ...`, is taken too."""
        if not lark.strip():
            raise RefusedError("the grammar is empty; send one with a rule `start`")
        return cls(json.dumps({"grammars": [{"lark_grammar": lark}]}, ensure_ascii=False))

    @classmethod
    def of_structural_tag(cls, structures: Sequence[tuple[str, Schema, str]], triggers: Sequence[str]) -> "Grammar":
        """Free text, in which a trigger must go on as one of the structures that begin with it.

        Args:
            structures: (begin, schema, end): JSON of the schema between two texts.
            triggers: texts; each structure's `begin` begins with one of them.

        Raises RefusedError.
        """
        if not 0 < len(structures) <= MAX_TAGS or not 0 < len(triggers) <= MAX_TAGS:
            raise RefusedError(
                f"{len(structures)} structures and {len(triggers)} triggers must be from 1 to {MAX_TAGS} each"
            )
        within: dict[str, list[str]] = {trigger: [] for trigger in triggers if trigger}
        for begin, schema, end in structures:
            trigger = next((trigger for trigger in within if begin.startswith(trigger)), None)
            if trigger is None:
                raise RefusedError(f"{begin[:80]!r} begins with none of the triggers; each structure must")
            parts = (begin[len(trigger) :] and literal(begin[len(trigger) :]), f"%json {bounded_json(schema)}")
            within[trigger].append(" ".join(part for part in (*parts, end and literal(end)) if part))
        used = [(trigger, bodies) for trigger, bodies in within.items() if bodies]
        rules = ["%llguidance {}", f"start: ({' | '.join(f'tag_{n}' for n in range(len(used)))})* TEXT"]
        rules.append(r"TEXT: /(.|\n)*/")
        for number, (trigger, bodies) in enumerate(used):
            rules.append(f"open_{number}[lazy]: TEXT {literal(trigger)}")
            rules.append(f"tag_{number}: open_{number} ({' | '.join(bodies)})")
        return cls.of_lark("\n".join(rules))


def bounded_json(schema: Schema) -> str:
    """A schema's JSON for `%json` in a Lark grammar: with bounded whitespace between the tokens of what it describes.

    Raises RefusedError for one that nests too deep, holds no JSON values, describes nothing, or sets the compiler's
    options.
    """
    check_depth(schema)
    if schema is False:
        raise RefusedError("the schema is false, which describes nothing; send one that does")
    schema = {} if schema is True else schema
    if COMPILER_KEY in schema:
        raise RefusedError(f"the schema has {COMPILER_KEY!r}, which is the compiler's; leave it out")
    try:
        text = json.dumps({**schema, COMPILER_KEY: {"whitespace_pattern": WHITESPACE}}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"the schema is no JSON: {error}") from error
    return text


def check_depth(schema: Any) -> None:
    """Raises RefusedError for a schema of more than MAX_DEPTH levels."""
    level, depth = [schema], 0
    while level := [one for one in level if isinstance(one, Mapping | list | tuple)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RefusedError(f"the schema has more than {MAX_DEPTH} levels of objects and lists; send a flatter one")
        level = [inner for one in level for inner in (one.values() if isinstance(one, Mapping) else one)]


def literal(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def regex_literal(regex: str) -> str:
    """A regular expression as Lark writes it, between slashes and on one line."""
    escaped = re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), regex, flags=re.S)
    return f"/{escaped}/"
