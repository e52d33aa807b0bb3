"""Arguments in FunctionGemma's form: whatever the rules take is as the schema says, read back."""

import json

import jsonschema
import pytest
from slipstream.engine_impl.errors import RefusedError
from slipstream.engine_impl.text.chat import Chat, Tool
from slipstream.server.dialects import gemma
from slipstream.server.dialects.syntax import AnswerSyntax
from slipstream.server.request.call_grammar import check_strict, must_call
from slipstream.server.request.chat import ChatCall, grammar_of

from tests.server.request.test_call_grammar import control_id, no_control, syntax, takes, walk

TEXT = {"type": "string"}
SCHEMAS = [
    {"properties": {"a": TEXT, "b": {"type": "integer"}, "c": {"type": "boolean"}}, "required": ["b"]},
    {"properties": {"a": {"enum": ["x", 5, None, True, "y z", ""]}, "b": {"const": "k"}}, "required": ["a", "b"]},
    {"properties": {"a": {"type": ["null", "number"]}, "b": {"anyOf": [{"type": "integer"}, {"const": "all"}]}}},
    {"properties": {"a": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}}},
    {"properties": {"a": {"type": "array", "items": TEXT, "maxItems": 0}}, "required": ["a"]},
    {"properties": {"a": {"type": "object", "properties": {"b": {"type": "null"}, "c": {"type": "boolean"}},
                          "required": ["c"]}}, "required": ["a"]},
    {"properties": {"a": {"type": "boolean"}}, "additionalProperties": True},
    {"properties": {}},
]  # fmt: skip


def tool(schema):
    return Tool(name="f", parameters=json.dumps(schema))


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_what_the_rules_take_validates(schema, seed):
    written = walk(must_call([tool(schema)], syntax("gemma"), 1, no_control), seed)
    call = gemma.called(written.removeprefix(gemma.OPEN).removesuffix(gemma.CLOSE))
    assert call is not None
    jsonschema.validate(call[1], {"type": "object"} | schema)


@pytest.mark.parametrize(
    ("arguments", "is_taken"),
    [
        ("b:5", True),
        ("a:<escape>x,{y}<escape>,b:5", True),
        ("a:<escape><escape>,b:-5,c:false", True),
        ("b:5,c:true", True),
        ("", False),
        ("a:<escape>x<escape>", False),
        ("b:5,a:<escape>x<escape>", False),
        ("b:5,", False),
        (",b:5", False),
        ("b:5.5", False),
        ("b:05", False),
        ("b:5,d:1", False),
    ],
)
@pytest.mark.parametrize("ids", [no_control, control_id])
def test_names_order_and_kinds(arguments, is_taken, ids):
    grammar = must_call([tool(SCHEMAS[0])], syntax("gemma"), 1, ids)
    assert takes(grammar, f"{gemma.OPEN}call:f{{{arguments}}}{gemma.CLOSE}", ids) == is_taken


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        ({"properties": {"a": {"type": "string", "maxLength": 3}}}, "maxLength"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/x"}}}}, r"\$ref"),
        ({"properties": {"a": {"enum": [[1]]}}}, "enum"),
        ({"properties": {"a": {"const": "<escape>"}}}, "const"),
        ({"properties": {"a b": TEXT}}, "properties"),
        ({"properties": {"a": {"type": "array", "maxItems": 1000}}}, "maxItems"),
        ({"properties": {"a": {"type": "object", "additionalProperties": TEXT}}}, "additionalProperties"),
    ],
)
def test_what_is_not_held_to_is_refused_where_it_must_be(schema, key):
    """And is any value elsewhere."""
    call = ChatCall(chat=Chat(turns=(), tools=(tool(schema),)), strict=frozenset({"f"}))
    with pytest.raises(RefusedError, match=f"tool 'f' is strict, .* not held to '{key}' of its parameters"):
        grammar_of(call, AnswerSyntax(tool_format="gemma", tools=frozenset({"f"})), 1, control_id)
    check_strict([tool(schema)], (), syntax("gemma"))
    walk(must_call([tool(schema)], syntax("gemma"), 1, no_control), 0)
