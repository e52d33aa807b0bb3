"""How often Python looks for garbage among its objects.

While a process starts it finds none: modules and programs stay. To look through them again and again took 0.5 s of 1.7
that the imports take on a CPU.
"""

import gc

USUAL = gc.get_threshold()
SELDOM = (50_000, 20, 50)
"""New objects between two looks at the youngest, and how many of these come before one at the older ones (count)."""


def seldom() -> None:
    """From now on, in a process that starts."""
    gc.set_threshold(*SELDOM)


def as_usual() -> None:
    """It has started: what is there stays, and is not looked through any more. A request of many small objects would
    have all of it looked through."""
    gc.freeze()
    gc.set_threshold(*USUAL)
