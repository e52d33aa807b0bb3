"""vLLM's endpoints for adapters while the server runs: /v1/load_lora_adapter and /v1/unload_lora_adapter."""

from typing import Any, TypeVar

from aiohttp import web
from pydantic import ValidationError
from pydantic_core import from_json

from ..gateway import Gateway
from ..net.security import Guard
from .errors import BadFieldError, bad_body
from .fields import Strict

BodyT = TypeVar("BodyT", bound=Strict)


class LoadBody(Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    """Read it anew if it is there already."""


class UnloadBody(Strict):
    """POST /v1/unload_lora_adapter. vLLM's own number of the adapter, `lora_int_id`, is ignored."""

    lora_name: str


async def load(gateway: Gateway, guard: Guard, authorizations: list[str], raw: bytes) -> web.Response:
    """Returns when it is there. Raises DeniedError, RefusedError, UnavailableError."""
    guard.check_manager(authorizations)
    body, store = read(LoadBody, raw), gateway.open_adapters
    await store.load(body.lora_name, store.allowed(body.lora_path), anew=body.load_inplace)
    return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload(gateway: Gateway, guard: Guard, authorizations: list[str], raw: bytes) -> web.Response:
    """Raises likewise, and UnknownModelError."""
    guard.check_manager(authorizations)
    name = read(UnloadBody, raw).lora_name
    gateway.open_adapters.unload(name)
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def read(kind: type[BodyT], raw: bytes) -> BodyT:
    """Raises BadFieldError."""
    try:
        fields: Any = from_json(raw)
        return kind.model_validate(fields)
    except ValidationError as error:
        raise bad_body(error) from error
    except ValueError as error:
        raise BadFieldError("", f"the body cannot be read: Invalid JSON: {error}") from error
