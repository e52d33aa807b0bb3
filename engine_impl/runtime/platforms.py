"""Which of JAX's platforms an engine runs on, before JAX is imported."""

import os
from pathlib import Path


def platform_of(asked: str) -> str:
    """What `EngineConfig.platform` comes to: a platform's name, or what JAX_PLATFORMS lists."""
    return asked if asked != "auto" else os.environ.get("JAX_PLATFORMS") or _platform_here()


def _platform_here() -> str:
    if any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*")):
        return "tpu"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
