"""Finds the compiled kernels and tells XLA their names.

The library is plain C to Python: it is opened by ctypes, and XLA calls its handlers itself.
"""

import ctypes
import functools
import hashlib
import logging
import sysconfig
from pathlib import Path
from typing import Any

import jax

PATH = Path(__file__).with_name(f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}")
SOURCES = Path(__file__).resolve().parent
HANDLERS = (
    "slipstream_panel_matmul",
    "slipstream_expert_matmul",
    "slipstream_ragged_attention",
    "slipstream_chunk_attention",
    "slipstream_rms_norm",
)

log = logging.getLogger(__name__)


def is_built() -> bool:
    """Whether CPUs have the kernels here."""
    return _library() is not None


def level() -> str:
    """The instructions in use: "amx", "avx512_bf16", "avx512", "avx2" or "generic".

    Raises RuntimeError where nothing is built.
    """
    return _opened().slipstream_level().decode()


def use_level(name: str) -> None:
    """Choose other instructions than the best that the CPU has, for tests.

    Raises ValueError for those that it has not.
    """
    if not _opened().slipstream_use_level(name.encode()):
        raise ValueError(f"this CPU does not run the kernels of {name=}; its own are {level()!r}")


def source_here() -> str | None:
    """The SHA-256 of the sources in a checkout, as setup.py compiles it in; None in an installed package."""
    if not (SOURCES.parents[1] / "setup.py").exists():
        return None
    paths = [*sorted(SOURCES.glob("*.cc")), *sorted(SOURCES.glob("*.h"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def call(handler: str, out: jax.ShapeDtypeStruct, *operands: jax.Array, **attributes: Any) -> jax.Array:
    """One of HANDLERS on row-major operands; may be traced. Raises RuntimeError where nothing is built."""
    _opened()
    return jax.ffi.ffi_call(handler, out)(*operands, **attributes)


def _opened() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError(f"there are no native kernels at {PATH}; build them: make setup")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not PATH.exists():
        log.info("built without native kernels: XLA's own products and attention run on this CPU, at half the speed")
        return None
    try:
        library = ctypes.CDLL(str(PATH))
        library.slipstream_level.restype = library.slipstream_source.restype = ctypes.c_char_p
        library.slipstream_use_level.restype, library.slipstream_use_level.argtypes = ctypes.c_bool, [ctypes.c_char_p]
        if source_here() not in (None, library.slipstream_source().decode()):
            log.warning(
                "the native kernels are older than their sources, XLA's run instead; build them: pip install -e ."
            )
            return None
        for name in HANDLERS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        log.warning("the native kernels cannot be used, XLA's run instead; build them anew: %s", error)
        return None
    return library
