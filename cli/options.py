"""A request's options as flags: made from their declaration, and where the command line differs."""

from typing import Annotated, Any, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from ..engine_impl.option import Option
from ..server.request.options import OPTIONS, AnswerOptions

OTHER_NAMES = {"stop_strings": "stop", "stop_token_ids": "stop-token-id"}
"""Flags that may be given several times have a single one's name."""


def request_flags(info: StructTypeInfo) -> StructConstructorSpec | None:
    """For tyro: the flags of a command that has AnswerOptions."""
    return StructConstructorSpec(made, tuple(map(flag, OPTIONS))) if info.type is AnswerOptions else None


def made(**values: Any) -> AnswerOptions:
    return AnswerOptions.of(**{one.name: one.collect(values[one.name]) for one in OPTIONS})


made.__doc__ = AnswerOptions.__doc__  # help shows it above the flags


def flag(one: Option) -> StructFieldSpec:
    kind: Any = one.kind
    default, help_text = one.default, one.doc()
    if isinstance(default, dict):
        kind, default = tuple[PAIR, ...], ()
    if get_origin(kind) is tuple:
        kind, help_text = tyro.conf.UseAppendAction[kind], f"{help_text} May be given several times."
    if one.allowed is not None:
        help_text += f" Must be {one.allowed.text}."
    if one.name in OTHER_NAMES:
        kind = Annotated[kind, tyro.conf.arg(name=OTHER_NAMES[one.name])]
    return StructFieldSpec(name=one.name, type=kind, default=default, helptext=help_text)


def pair(words: list[str]) -> tuple[int, float]:
    token_id, _, number = words[0].partition("=")
    try:
        return int(token_id), float(number)
    except ValueError:
        raise ValueError(f"{words[0]!r} must be ID=VALUE, such as 15=-100") from None


PAIR: Any = Annotated[
    tuple[int, float],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="ID=VALUE",
        instance_from_str=pair,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [f"{value[0]}={value[1]:g}"],
    ),
]
