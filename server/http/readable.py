"""Bodies: from JSON to checked fields, with what is refused by name."""

from typing import Any, ClassVar, Self

from pydantic import ValidationError
from pydantic_core import from_json

from ..request.limits import Limits
from .errors import BadFieldError, bad_body, shown
from .fields import Strict


class Readable(Strict):
    """Of one call."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields that would change the answer and that we lack, with the values that ask for nothing."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """Raises BadFieldError."""
        try:
            fields = from_json(body)
        except ValueError as error:
            raise BadFieldError("", f"the body cannot be read: Invalid JSON: {error}") from error
        try:
            return cls.model_validate(cls._given(fields))
        except ValidationError as error:
            raise bad_body(error) from error

    @classmethod
    def _given(cls, fields: Any) -> dict[str, Any]:
        """What is not null. Raises BadFieldError for a field that we lack."""
        if not isinstance(fields, dict):
            raise BadFieldError("", f"the body={shown(fields)}: Input should be an object")
        given = {name: value for name, value in fields.items() if value is not None}
        for name, neutral in cls.refused.items():
            if name in given and given[name] not in neutral:
                raise BadFieldError(name, f"{name}={shown(given[name])} is not supported; leave it out")
        return given

    def check_counts(self, limits: Limits) -> None:
        """Raises RefusedError for a prompt of more token ids than the engine takes."""
