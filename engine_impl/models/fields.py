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
        self._asked_for: set[str] = set()
        self._parts: list[Fields] = []

    def __getitem__(self, name: str) -> Any:
        """Raises RefusedError when the field is missing or null."""
        value = self._value(name)
        if value is None:
            raise self.refused(f"lacks {name}; fetch it anew")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default when it is missing or null."""
        value = self._value(name)
        return default if value is None else value

    def first(self, *names: str) -> Any:
        """The value of the first of these that is there: older and newer names of one field.

        Raises RefusedError when none is there.
        """
        return next((value for name in names if (value := self.get(name)) is not None), None) or self[names[0]]

    def unless_left_out(self, name: str, default: Any) -> Any:
        """The field's value, null too; the default where the config leaves it out."""
        return self._value(name, default)

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
        part = Fields({**given, **first}, f"{self._where}: {name}")
        self._parts.append(part)
        return part.filled(left_out)

    def filled(self, left_out: Mapping[str, Any]) -> "Fields":
        """The same fields, and of those in `left_out` the ones that the config does not have or that are null: values
        that the authors' own class gives them."""
        given = {field: value for field, value in self._fields.items() if value is not None}
        filled = Fields({**left_out, **given}, self._where)
        filled._asked_for, filled._parts = self._asked_for, self._parts
        return filled

    def unread(self) -> "list[tuple[Fields, dict[str, Any]]]":
        """The fields that nobody has asked for and that are not null, here and in each part that was read."""
        of_part = [part.unread() for part in self._parts]
        own = {name: value for name, value in self._fields.items() if value is not None and name not in self._asked_for}
        return [(self, own), *(found for part in of_part for found in part)]

    def only(self, name: str, *allowed: Any) -> None:
        """Raises RefusedError when the field is there, is not null and is none of these."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.refused(f"asks for {name}={value!r}; those there are: {', '.join(map(str, allowed))}")

    def _value(self, name: str, default: Any = None) -> Any:
        self._asked_for.add(name)
        return self._fields.get(name, default)

    def refused(self, what: str) -> RefusedError:
        """An error that says where."""
        return RefusedError(f"{self._where!r} {what}")

    def rope(
        self,
        kinds: Sequence[str],
        layer_type: str | None = None,
        also_called: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The rope's parameters, `rope_theta`, `rope_type` and `partial_rotary_factor` among them.

        They stand in `rope_parameters` since transformers 5, for some families one set for each layer type; before, in
        `rope_theta` beside `rope_scaling`. A config with neither is refused, there is no default.

        Args:
            kinds: the types of rope that the family has; another one is refused by name.
            layer_type: whose rope, of a family that has several.
            also_called: older names of these types.
        """
        if layer_type is not None and self.get("rope_parameters", {layer_type: {}}).get(layer_type) is None:
            raise self.refused(f"has rope_parameters without {layer_type}; fetch it anew")
        rope = self.rope_given(layer_type)
        if rope.get("rope_theta") is None and self.get("rope_scaling") and self.get("rope_parameters"):
            raise self.refused("has a rope_scaling beside rope_parameters, without rope_theta; move it into these")
        if rope.get("rope_theta") is None:
            remedy = ROPE_TO_ADD.get(self.get("model_type"), "add the one it was trained with")
            raise self.refused(f"has neither rope_parameters nor rope_theta; {remedy}")
        rope["rope_type"] = (also_called or {}).get(rope["rope_type"], rope["rope_type"])
        if rope["rope_type"] not in kinds:
            raise self.refused(f"scales its rope by {rope['rope_type']!r}; those there are: {', '.join(kinds)}")
        return rope

    def rope_given(self, layer_type: str | None = None) -> dict[str, Any]:
        """The parameters as they stand in the config, of whatever type; without `rope_theta` if it has none.

        Where `rope_scaling` stands beside `rope_parameters` it takes their place, as in transformers; where they are
        one set for each layer type, it is added to those of layers that see all.
        """
        new, old = self.get("rope_parameters", {}), self.get("rope_scaling", {})
        if layer_type in new:
            rope = {**(new[layer_type] or {}), **(old if layer_type == "full_attention" else {})}
        else:
            rope = dict(old or new)
        if layer_type != "sliding_attention":  # theirs has a theta of its own
            rope.setdefault("rope_theta", self.get("rope_theta"))
        rope.setdefault("partial_rotary_factor", self.get("partial_rotary_factor", 1))
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        return rope
