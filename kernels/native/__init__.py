"""The CPU kernels in C++, where the package was built with a compiler (setup.py)."""

from .library import call, is_built, level, use_level

__all__ = ["call", "is_built", "level", "use_level"]
