"""The model as HTTP calls it: its names, and its card."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..adapters.store import AdapterStore
from ..errors import UnknownModelError
from ..request.limits import Limits

if TYPE_CHECKING:
    from ...engine_impl.api import AnyEngine as Engine

MANY = 8
"""Adapters that a refusal names."""


class Names:
    """What clients may call the model."""

    def __init__(self, served: Sequence[str], created: int, adapters: AdapterStore | None = None) -> None:
        """`served`: the names of --served-model-name; none: what the engine calls it. `created`: s since 1970.
        `adapters`: may be asked for in the model's place."""
        self._served, self._created, self._adapters = tuple(served), created, adapters or AdapterStore()

    def of(self, engine: "Engine") -> tuple[str, ...]:
        """All of them. The first is that of answers."""
        return self._served or (engine.model_name,)

    def check(self, engine: "Engine", asked: str | None) -> None:
        """None asks for whatever there is. Raises UnknownModelError."""
        adapter = self.adapter(engine, asked)
        if adapter and not self._adapters.knows(adapter):
            others = " or ".join(map(repr, [*self.of(engine), *self._adapters.names[:MANY]]))
            raise UnknownModelError(f"model={asked!r} is not served; ask for {others}, or for none")

    def adapter(self, engine: "Engine", asked: str | None) -> str:
        """The adapter that is asked for, known or not; "" for the model."""
        return "" if asked is None or asked in self.of(engine) else asked

    def of_answer(self, engine: "Engine", asked: str | None) -> str:
        """What an answer calls whoever was asked."""
        return self.adapter(engine, asked) or self.of(engine)[0]

    def cards(self, engine: "Engine") -> list[dict[str, Any]]:
        """Of all names, then of all adapters."""
        return [self.card(engine, name) for name in (*self.of(engine), *(one.name for one in self._adapters))]

    def card(self, engine: "Engine", name: str) -> dict[str, Any]:
        """As /v1/models lists it; `max_model_len` (tokens) and `root` are vLLM's."""
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "slipstream",
            "root": engine.model_name,
            "parent": self.of(engine)[0] if self.adapter(engine, name) else None,
            "max_model_len": Limits.of(engine).longest,
        }
