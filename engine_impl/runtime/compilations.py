"""How many programs JAX has made, and the folder in which it keeps them for the next start."""

import logging
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

COMPILED, FOUND = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
"""What JAX reports (jax.monitoring): a program was made, by compiling it or from the folder; it was in the folder."""

FOLDER = "JAX_COMPILATION_CACHE_DIR"
"""JAX's name of the environment's variable that says where programs are kept."""

COMPLAINT = re.compile(r"Error (?P<act>reading|writing) persistent compilation cache entry for '(?P<program>[^']*)': ")
"""What JAX warns of, beside what went wrong."""


@dataclass(frozen=True)
class Compilations:
    """Programs made since keep_in(), by JAX's own report."""

    compiled: int = 0
    found: int = 0
    """Read from the folder instead."""

    @property
    def made(self) -> int:
        return self.compiled + self.found


_made = _found = 0
_lock = threading.Lock()
_is_counting = False


def keep_in(folder: Path | str) -> None:
    """Programs are kept in `folder` from now on, the small ones too, and counted. Call it before the first one."""
    import jax  # late: those who only ask for programs() are spared it

    global _is_counting
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not _is_counting:
        _is_counting = True
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
        jax.monitoring.register_event_listener(_on_event)
        warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
        _mend(Path(folder))


def programs() -> Compilations:
    """So far."""
    with _lock:
        return Compilations(_made - _found, _found)


def _mend(folder: Path) -> None:
    """JAX writes no program over one that is there already, be it damaged: a disk that was full, or a start that was
    killed, would cost a compilation at every later start. So a program that cannot be read makes room for the new one,
    together with those of its name, of which JAX does not tell them apart."""
    show = warnings.showwarning

    def mended(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        complaint = COMPLAINT.match(str(message))
        if complaint is None:
            show(message, *args, **kwargs)
            return
        cause = " ".join(str(message)[complaint.end() :].split())[:120]
        if complaint["act"] == "writing":
            log.warning("a compiled program cannot be kept in %s (%s); make room there", folder, cause)
            return
        log.warning("a compiled program in %s is damaged (%s); it is compiled and kept anew", folder, cause)
        for path in folder.glob(f"{complaint['program']}-*-cache"):
            path.unlink(missing_ok=True)

    warnings.showwarning = mended


def _on_duration(event: str, duration_secs: float, **about: str | int) -> None:
    global _made
    if event == COMPILED:
        with _lock:
            _made += 1


def _on_event(event: str, **about: str | int) -> None:
    global _found
    if event == FOUND:
        with _lock:
            _found += 1
