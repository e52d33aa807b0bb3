"""What an answer must look like, as flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..engine_impl.errors import RefusedError
from ..server.request.form import AnswerForm
from ..server.request.grammar import MAX_GRAMMAR


@dataclass(frozen=True)
class FormFlags:
    """What the answer must look like; at most one of these. Its end ends the answer."""

    json_schema: Path | None = None
    """JSON that this schema describes (path of a JSON file)."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A text that this regular expression matches as a whole."""
    choices: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="choice")] = ()
    """One of these texts; may be given several times."""
    grammar: Path | None = None
    """A text of this grammar (path of a file in Lark or GBNF)."""

    def form(self) -> AnswerForm:
        """Raises RefusedError for a file that cannot be read, and for two at once."""
        return AnswerForm(
            json_schema=text_of(self.json_schema),
            json_object=self.json_object,
            regex=self.regex,
            choices=self.choices,
            grammar=text_of(self.grammar),
        )


def text_of(path: Path | None) -> str | None:
    """Of a file. Raises RefusedError."""
    if path is None:
        return None
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_GRAMMAR + 1)  # what is longer is refused, whatever it says
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"cannot read {path}: {error}") from error
