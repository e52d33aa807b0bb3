"""A GGUF model in one file or in several (`name-00001-of-00003.gguf`), read as one."""

from pathlib import Path

import numpy as np

from ..errors import RefusedError
from .contract import Codes
from .gguf_file import GGUFFile


class GGUFParts:
    """`fields` of the first file, `tensors` of all, by their names."""

    def __init__(self, path: Path) -> None:
        """Raises RefusedError when a file is missing, cut, no GGUF file, or not the first of several."""
        first = _open(path)
        count, number = first.fields.get("split.count", 1), first.fields.get("split.no", 0)
        if number:
            raise RefusedError(f"{str(path)!r} is file {number + 1} of {count}; give the first one")
        self.paths = paths = [path] if count <= 1 else _paths(path, count)
        missing = [part.name for part in paths if not part.is_file()]
        if missing:
            raise RefusedError(f"{str(path)!r} lacks {len(missing)} of {count} files: {', '.join(missing)}; fetch them")
        files = [first, *map(_open, paths[1:])]
        for expected, file in enumerate(files):
            self._check_number(file, expected, count)
        self.fields = first.fields
        self.tensors = {name: stored for file in files for name, stored in file.tensors.items()}
        self._file_of = {name: file for file in files for name in file.tensors}
        stated = first.fields.get("split.tensors.count", len(self.tensors))
        if not len(self.tensors) == sum(len(file.tensors) for file in files) == stated:
            raise RefusedError(
                f"{str(path)!r} tells of {stated} tensors, its {count} files hold others; fetch them anew"
            )

    def _check_number(self, file: GGUFFile, expected: int, count: int) -> None:
        number, of = file.fields.get("split.no", 0), file.fields.get("split.count", 1)
        if count > 1 and (number, of) != (expected, count):
            raise RefusedError(
                f"{str(file.path)!r} says that it is file {number + 1} of {of}, by its name it is {expected + 1} of "
                f"{count}; fetch it anew"
            )

    def tensor(self, name: str, index: int | None = None) -> np.ndarray:
        """As of `GGUFFile`."""
        return self._file_of[name].tensor(name, index)

    def codes(self, name: str, index: int | None = None) -> Codes:
        """As of `GGUFFile`."""
        return self._file_of[name].codes(name, index)


def _open(path: Path) -> GGUFFile:
    if not path.is_file():
        raise RefusedError(f"model file {str(path)!r} does not exist; give `embedded` or the path of a GGUF file")
    try:
        return GGUFFile(path)
    except (ValueError, OSError) as error:
        raise RefusedError(f"model file {str(path)!r} is no readable GGUF file ({error}); fetch it anew") from error


def _paths(first: Path, count: int) -> list[Path]:
    end = f"-00001-of-{count:05}.gguf"
    if not first.name.endswith(end):
        raise RefusedError(f"{str(first)!r} is the first of {count} files; its name has to end in {end!r}")
    begin = first.name.removesuffix(end)
    return [first.with_name(f"{begin}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
