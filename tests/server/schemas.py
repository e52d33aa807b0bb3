"""Random JSON schemas of all kinds that answers are held to, small enough for answers of a tiny model."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "b c", "long_name_of_a_key", 'q"', "é", "n1")


def schema(chance: random.Random, depth: int = 2) -> Schema:
    """One whose objects and lists nest `depth` deep at most."""
    kinds: list[Callable[[random.Random, int], Schema]] = [leaf, leaf, many, keyed, either] if depth else [leaf]
    return chance.choice(kinds)(chance, depth - 1)


def leaf(chance: random.Random, depth: int) -> Schema:
    del depth
    low = chance.randint(-60, 60)
    short = chance.randint(0, 3)
    return chance.choice(
        [
            {"type": "boolean"},
            {"type": ["null", "boolean"]},
            {"const": chance.choice(["x y", 7, None, True, [1, "b"], {"k": 0.5}])},
            {"enum": chance.sample([1, -2.5, "one", "two", None, False, [], {"a": 1}], 3)},
            {"type": "integer", "minimum": low, "maximum": low + chance.randint(0, 90)},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 95},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5},
            {"type": "string", "minLength": short, "maxLength": short + 3},
            {"type": "string", "pattern": "^[a-d]{1,3}(-[0-9]{2})?$"},
            {"type": "string", "format": chance.choice(["date", "ipv4", "uuid", "date-time"])},
        ]
    )


def many(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    listed = {"type": "array", "items": schema(chance, depth), "minItems": least, "maxItems": least + 1}
    fixed = [schema(chance, depth) for _ in range(2)]
    return chance.choice([listed, {"type": "array", "prefixItems": fixed, "items": False, "minItems": 2}])


def keyed(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(NAMES, chance.randint(1, 3))
    of = {"type": "object", "properties": {name: schema(chance, depth) for name in names}}
    closed = of | {"required": [name for name in names if chance.random() < 0.7], "additionalProperties": False}
    open_to = {"type": "object", "additionalProperties": schema(chance, 0), "minProperties": 1, "maxProperties": 2}
    itself = {"type": "object", "properties": {"v": schema(chance, 0), "next": {"$ref": "#"}}, "required": ["v"]}
    return chance.choice([closed, closed, open_to, itself | {"additionalProperties": False}])


def either(chance: random.Random, depth: int) -> Schema:
    return {"anyOf": [schema(chance, depth), schema(chance, 0)]}


def schemas(count: int, seed: int) -> list[Schema]:
    """So many, always the same ones."""
    chance = random.Random(seed)
    made = []
    while len(made) < count:
        one = schema(chance)
        if "$ref" not in str(one) or "next" in one.get("properties", {}):  # "#" is the whole schema
            made.append(one)
    return made
