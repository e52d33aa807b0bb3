"""Arguments of an engine's verbs as messages, and back: numbers, arrays, the face's dataclasses, and handles by number.

Nothing that a message says is executed: unlike a pickle's bytes, it can only name the types of RECORDS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ...protos import hosts_pb2 as pb
from ..api import Allowed, Opening, Piece
from ..sampling.params import SamplingParams
from .handles import Handle

RECORDS: dict[str, type] = {kind.__name__: kind for kind in (Piece, Opening, Allowed, SamplingParams)}


def encoded(value: Any) -> pb.Value:
    """Raises TypeError for what has no form on the wire."""
    match value:
        case None:
            return pb.Value(nothing=True)
        case Handle():
            return pb.Value(handle=value.number)
        case bool() | np.bool_():
            return pb.Value(truth=bool(value))
        case int() | np.integer():
            return pb.Value(whole=int(value))
        case float() | np.floating():
            return pb.Value(real=float(value))
        case str():
            return pb.Value(text=value)
        case np.ndarray():
            return pb.Value(array=pb.Array(dtype=value.dtype.str, shape=value.shape, data=value.tobytes()))
        case Mapping():
            both = [encoded(one) for pair in value.items() for one in pair]
            return pb.Value(pairs=pb.Values(values=both))
        case Sequence():
            if all(type(one) is int for one in value):
                return pb.Value(wholes=pb.Wholes(values=value))
            return pb.Value(several=pb.Values(values=[encoded(one) for one in value]))
    name = type(value).__name__
    if RECORDS.get(name) is not type(value):
        raise TypeError(f"a {name} cannot be sent to other hosts")
    return pb.Value(
        record=pb.Record(type=name, fields={of.name: encoded(getattr(value, of.name)) for of in fields(value)})
    )


def decoded(value: pb.Value, held: Callable[[int], Any]) -> Any:
    """Sequences come as tuples. `held` gives what stands behind a handle's number."""
    kind = value.WhichOneof("kind")
    match kind:
        case "nothing":
            return None
        case "truth" | "whole" | "real" | "text":
            return getattr(value, kind)
        case "handle":
            return held(value.handle)
        case "array":
            array = np.frombuffer(value.array.data, np.dtype(value.array.dtype))
            return array.reshape(tuple(value.array.shape))
        case "wholes":
            return tuple(value.wholes.values)
        case "several":
            return tuple(decoded(one, held) for one in value.several.values)
        case "pairs":
            both = [decoded(one, held) for one in value.pairs.values]
            return dict(zip(both[::2], both[1::2], strict=True))
        case "record":
            of_fields = {name: decoded(one, held) for name, one in value.record.fields.items()}
            return RECORDS[value.record.type](**of_fields)
    raise ValueError("a value of no known kind")
