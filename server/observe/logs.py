"""The log on stderr: lines to read, or one JSON object a line. Prompts are in it only if asked for."""

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from .status import StatusLine

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer

PROMPTS = logging.getLogger("slipstream.server.prompts")
"""Prompts are logged here, at DEBUG: deaf unless configure() is told otherwise."""


def configure(form: Literal["text", "json"], *, prompts: bool = False, line: StatusLine | None = None) -> None:
    """Our records at INFO, everybody else's at WARNING, to stderr, above the status line if there is one."""
    handler = Handler(line)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("slipstream").setLevel(logging.INFO)
    PROMPTS.setLevel(logging.DEBUG if prompts else logging.INFO)


def log_prompt(request_id: str, prompt_ids: Sequence[int], tokenizer: "Tokenizer") -> None:
    """What was asked, if that is to be logged at all."""
    if PROMPTS.isEnabledFor(logging.DEBUG):
        fields = {"request_id": request_id, "prompt": tokenizer.decode(prompt_ids)}
        PROMPTS.debug("request asks", extra={"fields": fields})


class Handler(logging.StreamHandler):
    """Wipes the status line before a record is written."""

    def __init__(self, line: StatusLine | None) -> None:
        super().__init__(sys.stderr)
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        if self._line is not None:
            self._line.clear()
        super().emit(record)


class TextFormatter(logging.Formatter):
    """`12:00:00,123 I request ended request_id=abc outcome=ok`: the message, then what the record knows beside it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname).1s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        known = {name: value for name, value in fields_of(record).items() if value is not None}
        return " ".join(
            [super().formatMessage(record), *(f"{name}={readable(value)}" for name, value in known.items())]
        )


class JsonFormatter(logging.Formatter):
    """Keys: time (UTC, ISO 8601), level, logger, message, then what the record knows; exception, if there was one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line |= fields_of(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def readable(value: object) -> str:
    """A text that could be taken for more than one value, or for more than one line, stands in quotes."""
    text = str(value)
    return text if text.isprintable() and text and not set(text) & set(" =\"'") else repr(text)


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What was logged with `extra={"fields": {...}}`."""
    return getattr(record, "fields", {})
