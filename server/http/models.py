"""The model as HTTP calls it: its names, and its card."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..request.request import Limits
from .errors import UnknownModelError

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine


class Names:
    """What clients may call the model."""

    def __init__(self, served: Sequence[str], created: int) -> None:
        """`served`: the names of --served-model-name; none: what the engine calls it. `created`: s since 1970."""
        self._served, self._created = tuple(served), created

    def of(self, engine: "Engine") -> tuple[str, ...]:
        """All of them. The first is that of answers."""
        return self._served or (engine.model_name,)

    def check(self, engine: "Engine", asked: str | None) -> None:
        """None asks for whatever there is. Raises UnknownModelError."""
        names = self.of(engine)
        if asked is not None and asked not in names:
            others = " or ".join(map(repr, names))
            raise UnknownModelError(f"model={asked!r} is not served; ask for {others}, or for none")

    def card(self, engine: "Engine", name: str) -> dict[str, Any]:
        """As /v1/models lists it; `max_model_len` (tokens) and `root` are vLLM's."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "slipstream",
            "root": engine.model_name,
            "parent": None,
            "max_model_len": Limits.of(engine).longest,
        }
