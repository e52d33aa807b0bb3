"""`serve --config FILE`: flags from a YAML file, a line for each, as words before those of the command line.

    model: /models/llama-3.1-8b
    http-port: 8000
    prefix-cache: false          # as --no-prefix-cache
    allow-origin: [https://a.example, https://b.example]

A key is a flag's name without its dashes, a value is what stands behind the flag, in its own spelling: YAML's types are
not asked. A flag of the command line stands later, so it wins.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

from ..engine_impl.errors import RefusedError
from ..server.flags import check_name, flags_of

FLAG = "config"


def with_file(argv: Sequence[str], command: type) -> Sequence[str]:
    """The words of a command line whose first is the command's name, with those of its --config file behind it.

    Raises RefusedError for a file that cannot be read or says what no flag does.
    """
    path = file_named(argv)
    if path is None:
        return argv
    name, *words = argv
    return [name, *words_of(path, flags_of(command)), *words]


def file_named(argv: Sequence[str]) -> Path | None:
    """What the last --config says."""
    found = None
    for word, after in zip(argv, [*argv[1:], None], strict=True):
        if word == f"--{FLAG}" and after is not None:
            found = Path(after)
        elif word.startswith(f"--{FLAG}="):
            found = Path(word.partition("=")[2])
    return found


def words_of(path: Path, flags: dict[str, Any]) -> Iterator[str]:
    """The flags that a file says. Raises RefusedError with the line that is wrong."""
    import yaml

    try:
        root = yaml.compose(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"cannot read the config file {path}: {error}") from error
    except yaml.YAMLError as error:
        raise RefusedError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise RefusedError(f"{path} must hold lines of `flag: value`, such as `slots: 64`")
    seen: set[str] = set()
    for key, value in root.value:
        name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if name == FLAG:
            raise RefusedError(f"{where}: {FLAG} names this file; a second one cannot be read from it")
        check_name(name, flags, where)
        if name in seen:
            raise RefusedError(f"{where}: {name} stands there twice; leave one of them out")
        seen.add(name)
        yield from words(name, flags[name], value, where)


def words(name: str, kind: Any, value: Any, where: str) -> list[str]:
    """The flag as the command line has it. `value`: YAML's node."""
    texts = [value] if value.id == "scalar" else value.value
    if value.id == "mapping" or any(text.id != "scalar" for text in texts):
        raise RefusedError(f"{where}: {name} takes a value, not lines of its own")
    texts = [text.value for text in texts if text.value or text.style]
    if get_origin(kind) is tuple:
        return [f"--{name}", *texts]
    if value.id != "scalar":
        raise RefusedError(f"{where}: {name} takes one value, not a list")
    if not texts:
        raise RefusedError(f"{where}: {name} has no value; leave the line out for the default")
    if kind is not bool:
        return [f"--{name}={texts[0]}"]
    if texts[0] not in ("true", "false"):
        raise RefusedError(f"{where}: {name}={texts[0]!r} must be true or false")
    return [f"--{name}" if texts[0] == "true" else f"--no-{name}"]
