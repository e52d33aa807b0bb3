"""The command line: `slipstream serve | ask | generate | ...` (COMMANDS). Its flags are the fields of dataclasses.

parse() only parses, main() also runs. Nothing heavy is imported before a command runs.
"""

import contextlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any, get_args

import tyro
from tyro import _strings

from ..engine_impl.errors import RefusedError
from ..engine_impl.runtime import garbage
from ..server.errors import FailedError, QueueFullError, UnavailableError
from ..server.request.options import check_utf8
from .ask import Ask
from .bench import Bench
from .chat import Chat
from .config_file import with_file
from .demo import Demo
from .fetch import Fetch
from .generate import Generate
from .models import Models
from .options import request_flags
from .plan import Plan
from .score import Score
from .serve import Serve
from .telling import BAD_INPUT, FAILED, tell

Command = Serve | Ask | Generate | Chat | Demo | Plan | Bench | Score | Models | Fetch
COMMANDS = {
    "serve": Serve, "ask": Ask, "generate": Generate, "chat": Chat, "demo": Demo, "plan": Plan, "bench": Bench,
    "score": Score, "models": Models, "fetch": Fetch,
}  # fmt: skip
STYLE = (tyro.conf.OmitArgPrefixes,)
CONSTRUCTORS: dict[str, Any] = {
    # `serve` has --no-x beside each --x, so that both can overrule a --config file.
    name: command if command is Serve else Annotated[command, tyro.conf.FlagCreatePairsOff]
    for name, command in COMMANDS.items()
}

INTERRUPTED = 130


def parse(argv: Sequence[str]) -> Command:
    """The command that `argv`, without the program's name, asks for.

    Raises RefusedError for a bad value, SystemExit with status 2 for a line that cannot be read, with 0 after --help.
    """
    for number, word in enumerate(argv, start=1):
        check_utf8(word, f"argument {number}")
    if argv and COMMANDS.get(argv[0]) is Serve:
        argv = with_file(argv, Serve)
    stdout, stderr = Held(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr),
            own_flags(), help_in_paragraphs(),
        ):  # fmt: skip
            return tyro.extras.subcommand_cli_from_dict(
                CONSTRUCTORS, args=argv, prog="slipstream", description="An LLM server for TPUs.", config=STYLE
            )
    except SystemExit as stop:
        # tyro wraps what a dataclass refuses into a box that names its internals.
        error: BaseException | None = stop
        while error is not None:
            if isinstance(error, RefusedError):
                raise error from None
            error = error.__context__
        sys.stderr.write(stderr.getvalue())
        sys.stdout.write(wrapped(stdout.getvalue()))
        raise


def main() -> None:
    """Runs and exits: 0 done, 1 failed, 2 bad input, 130 Ctrl-C."""
    garbage.seldom()
    open_standard_files()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an emoji must not end the program on a terminal that has none
    sys.exit(run(sys.argv[1:]))


def open_standard_files() -> None:
    """Those that we were started without go nowhere. Otherwise the next file that is opened would be stdout."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115


def run(argv: Sequence[str]) -> int:
    """Parses and runs; what a user can do something about is one line on stderr."""
    try:
        return parse(argv).run()
    except RefusedError as error:
        return tell(error, BAD_INPUT)
    except (FailedError, QueueFullError, UnavailableError) as error:
        return tell(error, FAILED)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `slipstream ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


@contextlib.contextmanager
def own_flags():
    """A request's options as flags, from their declaration. And help shows `--seed INT` for an `int | None`, whose
    default its text tells, instead of `{None}|INT`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
        if len(get_args(info.type)) != 2 or len(kinds) != 1 or not callable(kinds[0]):
            return None
        kind: Any = kinds[0]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=kind.__name__.upper(),
            instance_from_str=lambda words: kind(words[0]),
            is_instance=lambda value: value is None or isinstance(value, kind),
            str_from_instance=lambda value: ["none" if value is None else str(value)],
        )

    registry.struct_rule(request_flags)
    with registry:
        yield


class Held(io.StringIO):
    """Output kept back, written as for where it will go: boxes and colours as stdout can show them."""

    @property
    def encoding(self) -> str:
        return getattr(sys.__stdout__, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


@contextlib.contextmanager
def help_in_paragraphs():
    """Lets a docstring's lines run together in help. tyro itself keeps the break before every line that starts with
    something else than a letter, and a field's docstring comes to it with its lines indented."""
    theirs = _strings.remove_single_line_breaks
    _strings.remove_single_line_breaks = joined
    try:
        yield
    finally:
        _strings.remove_single_line_breaks = theirs


def joined(text: str) -> str:
    """Each paragraph on one line; paragraphs are what blank lines part."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


def wrapped(text: str) -> str:
    """A help text with the command's description, which stands above tyro's boxes, as wide as the terminal; any other
    text as it is."""
    usage, _, rest = text.partition("\n\n")
    description, edge, boxes = rest.partition("\n\n╭" if "╭" in rest else "\n\n ")
    if not edge:
        return text
    width = shutil.get_terminal_size().columns
    lines = (textwrap.fill(line, width, break_on_hyphens=False) for line in description.split("\n"))
    return "\n".join([usage, "", *lines]) + edge + boxes


if __name__ == "__main__":
    main()
