"""The fields of a Hugging Face `config.json`, read with a message for whatever is not as it should be."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RefusedError

ROPE_TO_ADD = {"llama": 'add the one it was trained with, which for Llama 2 is "rope_theta": 10000.0'}
"""What to do about a config that names no rope: Llama 2's were published so."""


class Fields:
    """What a family reads its config from. Nothing is guessed: what a model cannot do without is asked for by index."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        """`where` opens every message: the file's path."""
        self._fields, self._where = fields, where

    def __getitem__(self, name: str) -> Any:
        """Raises RefusedError when the field is missing or null."""
        value = self._fields.get(name)
        if value is None:
            raise self.refused(f"lacks {name}; fetch it anew")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default when it is missing or null."""
        value = self._fields.get(name)
        return default if value is None else value

    def part(self, name: str, left_out: Mapping[str, Any], beside: Sequence[str] = ()) -> "Fields":
        """The fields of an object within, and of those that stand beside it the ones named: they go first.

        `left_out` are the values that the authors' own class gives to fields that they left out of what they published.
        Raises RefusedError when there is no such object.
        """
        fields = self[name]
        if not isinstance(fields, dict):
            raise self.refused(f"has a {name} that is no JSON object; fetch it anew")
        given = {field: value for field, value in fields.items() if value is not None}
        first = {field: self.get(field) for field in beside if self.get(field) is not None}
        return Fields({**left_out, **given, **first}, f"{self._where}: {name}")

    def only(self, name: str, *allowed: Any) -> None:
        """Raises RefusedError when the field is there, is not null and is none of these."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.refused(f"asks for {name}={value!r}; those there are: {', '.join(map(str, allowed))}")

    def refused(self, what: str) -> RefusedError:
        """An error that says where."""
        return RefusedError(f"{self._where!r} {what}")

    def rope(self, kinds: Sequence[str] = ("default",), layer_type: str | None = None) -> dict[str, Any]:
        """The rope's parameters, `rope_theta` and `rope_type` among them.

        They stand in `rope_parameters` since transformers 5, for some families one set a layer type; before, in
        `rope_theta` beside `rope_scaling`. A config with neither is refused, there is no default.
        """
        if (parameters := self.get("rope_parameters")) is not None:
            if layer_type is not None:
                parameters = parameters.get(layer_type)
                if parameters is None:
                    raise self.refused(f"has rope_parameters without {layer_type}; fetch it anew")
            rope = dict(parameters)
        else:
            rope = {"rope_theta": self.get("rope_theta"), **self.get("rope_scaling", {})}
        if rope.get("rope_theta") is None:
            remedy = ROPE_TO_ADD.get(self.get("model_type"), "add the one it was trained with")
            raise self.refused(f"has neither rope_parameters nor rope_theta; {remedy}")
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in kinds:
            raise self.refused(f"scales its rope by {rope['rope_type']!r}; those there are: {', '.join(kinds)}")
        return rope
