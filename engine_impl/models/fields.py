"""The fields of a Hugging Face `config.json`, read with a message for whatever is not as it should be."""

from collections.abc import Sequence
from typing import Any

from ..errors import RefusedError


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
            raise self.refused("has neither rope_parameters nor rope_theta; add the one it was trained with")
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        if rope["rope_type"] not in kinds:
            raise self.refused(f"scales its rope by {rope['rope_type']!r}; those there are: {', '.join(kinds)}")
        return rope
