"""The log on stderr: lines to read, or one JSON object a line. Prompts are in it only if asked for."""

import json
import logging
import queue
import select
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from .standard_files import await_room
from .status import StatusLine

if TYPE_CHECKING:
    from ...engine_impl.api import Tokenizer

log = logging.getLogger(__name__)
PROMPTS = logging.getLogger("slipstream.server.prompts")
"""Prompts are logged here, at DEBUG: deaf unless configure() is told otherwise."""

WAITING = 10_000
"""Lines that may wait to be written (count)."""
PIECE = select.PIPE_BUF // 4
"""Written at once (characters): a pipe that has room has room for so many, whatever their encoding."""
FLUSH_S = 1.0
"""How long the process's end waits for them (seconds)."""


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


class Handler(logging.Handler):
    """Writes lines in a thread of its own, above the status line: whoever reads stderr, or has stopped to, holds up no
    request. Lines that find no place are counted, and told when there is one again."""

    def __init__(self, line: StatusLine | None) -> None:
        super().__init__()
        self._line, self._stream = line, sys.stderr
        self._lines: queue.Queue[str] = queue.Queue(WAITING)
        self.dropped = self._told = 0
        """Lines that found no place so far; of those, what was told."""
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1  # under the handler's lock
        except Exception:  # of a message that does not fit its arguments: a bug of ours, and no reason to fail
            self.handleError(record)

    def flush(self) -> None:
        """Waits until all is written, as long as somebody reads."""
        deadline = time.monotonic() + FLUSH_S
        while self._lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.005)

    def _write_all(self) -> None:
        while True:
            text = self._lines.get()
            with suppress(OSError, ValueError):  # nobody reads, or it is closed
                self._write(text)
            self._lines.task_done()

    def _write(self, text: str) -> None:
        if self._stream is None:  # the process was started without
            return
        if self._line is not None:
            self._line.clear()
        if dropped := self.dropped - self._told:
            self._told += dropped
            text = f"{text}\n{dropped} lines of the log were dropped: nobody read it"
        text += "\n"
        for begin in range(0, len(text), PIECE):
            await_room(self._stream)
            self._stream.write(text[begin : begin + PIECE])
        self._stream.flush()


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
