"""A request's options as fields of HTTP's bodies: made from their declaration, and where OpenAI's or vLLM's differ."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from pydantic import create_model

from ...engine_impl.sampling.params import MAX_SEED
from ..request.options import OPTIONS
from .errors import OTHER_NAMES, BadFieldError
from .fields import MAX_ITEMS, Prediction, Texts, at_most, few
from .readable import Readable

OF_EACH_BODY = {"max_tokens", "logprobs"}
"""Options that completions and chats ask for in two ways: fields of their own."""

AS_DECLARED: Any = object()


@dataclass(frozen=True)
class Difference:
    """How a field differs from its option."""

    default: Any = AS_DECLARED
    kind: Any = AS_DECLARED
    read: Callable[[Any], Any] = lambda value: value
    """The option's value of the field's. Raises BadFieldError."""


def all_or_k(top_k: int) -> int:
    return 0 if top_k == -1 else top_k


def listed(stop: str | list[str]) -> list[str]:
    return [stop] if isinstance(stop, str) else stop


def by_id(logit_bias: dict[str, float]) -> dict[int, float]:
    """JSON's keys are strings."""
    for key in logit_bias:
        if not re.fullmatch(r"-?(0|[1-9][0-9]{0,18})", key):
            raise BadFieldError("logit_bias", f'logit_bias: {key!r:.80} must be a token id, such as "15"')
    return {int(key): number for key, number in logit_bias.items()}


def lowest_bits(seed: int | None) -> int | None:
    """OpenAI takes any integer."""
    return None if seed is None else seed & MAX_SEED


DIFFERENCES = {
    "temperature": Difference(default=1.0),
    "top_k": Difference(read=all_or_k),  # vLLM's other way to keep all is -1
    "seed": Difference(read=lowest_bits),
    "stop_strings": Difference(kind=Texts, read=listed),
    "prompt_logprobs": Difference(kind=int | None, default=None, read=lambda k: k is not None),  # vLLM's k, see Body
    "prediction": Difference(kind=Prediction | None, read=lambda prediction: prediction and prediction.text),
    "logit_bias": Difference(kind=Annotated[dict[str, float], at_most(MAX_ITEMS)], read=by_id),
}
SAME = Difference()

IN_BOTH = [one for one in OPTIONS if one.name not in OF_EACH_BODY]


def field_of_option(name: str) -> str:
    """What HTTP calls it."""
    return OTHER_NAMES.get(name, name)


def options_in(body: Any) -> dict[str, Any]:
    """Values by the options' names, of those IN_BOTH. Raises BadFieldError."""
    return {
        one.name: one.collect(DIFFERENCES.get(one.name, SAME).read(getattr(body, field_of_option(one.name))))
        for one in IN_BOTH
    }


def _as_field(name: str, kind: Any, default: Any) -> tuple[Any, Any]:
    differs = DIFFERENCES.get(name, SAME)
    if get_origin(kind) is tuple:  # JSON has lists
        kind = Annotated[list[get_args(kind)[0]], *few(MAX_ITEMS)]
    return (
        kind if differs.kind is AS_DECLARED else differs.kind,
        default if differs.default is AS_DECLARED else differs.default,
    )


_fields: dict[str, Any] = {field_of_option(one.name): _as_field(one.name, one.kind, one.default) for one in IN_BOTH}
DeclaredFields: Any = create_model("DeclaredFields", __base__=Readable, **_fields)
"""A pydantic model with a field for each option IN_BOTH."""
