"""The fields of a `quantization_config`, read with a message for whatever is not as it should be."""

from collections.abc import Mapping
from typing import Any

from ..errors import RefusedError
from ..models.fields import Fields

REMEDY = "take a copy of the model that is not quantised, and give --quantize-weights int8 or int4"


class Said(Fields):
    """A quantization_config."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        super().__init__(fields, where)
        self.described, self.where = fields, where

    def refused(self, what: str) -> RefusedError:
        return RefusedError(f"{self.where!r} {what} (quantization_config); {REMEDY}")

    def changed(self, fields: Mapping[str, Any]) -> "Said":
        """The same, but for these fields."""
        return Said({**self.described, **fields}, self.where)

    def group(self, value: Any) -> int | None:
        """Inputs that share a scale; None: all."""
        if not isinstance(value, int) or value == 0 or value < -1:
            raise self.refused(f"asks for group_size={value!r}")
        return None if value == -1 else value

    def block(self, value: Any) -> tuple[int, int]:
        """Outputs and inputs that share a scale."""
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)):
            raise self.refused(f"asks for blocks of {value!r}")
        return value[0], value[1]
