"""The native CPU kernels, an optional part of the package; everything else is said in pyproject.toml.

They are C++ that XLA calls, so the build needs a compiler and the headers that jaxlib brings. Without one of them, or
where compiling fails, the package is built without the kernels, and engines on CPUs run XLA's own products.
"""

import hashlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(Path("kernels/native").glob("*.cc"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
HEADERS = sorted(Path("kernels/native").glob("*.h"))


def has_compiler() -> bool:
    """Whether the C++ compiler that the environment, or this Python's build, names can be run."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return any(shutil.which(name) for name in (command.split()[0], "c++", "g++", "clang++"))


def headers() -> Path | None:
    """The folder with XLA's headers."""
    found = importlib.util.find_spec("jaxlib")
    folder = Path(found.origin).parent / "include" if found and found.origin else None
    return folder if folder and (folder / "xla/ffi/api/ffi.h").exists() else None


def extensions() -> list[Extension]:
    include = headers()
    if not SOURCES or not include or not has_compiler():
        return []
    source = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES + HEADERS)).hexdigest()
    return [
        Extension(
            "slipstream.kernels.native._kernels",
            [str(path) for path in SOURCES],
            depends=[str(path) for path in HEADERS],
            define_macros=[("SLIPSTREAM_SOURCE", f'"{source}"')],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wno-maybe-uninitialized",
                f"-isystem{include}",
            ],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=extensions(), setup_requires=["jaxlib>=0.10.2,<0.12"] if has_compiler() and not headers() else [])
