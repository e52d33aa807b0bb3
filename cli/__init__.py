"""The command line: a dataclass for each command, whose fields are the flags and whose run() does the work."""

import os

# Before NumPy comes in: a thread of its BLAS that allocates would give every thread a heap of its own (allocator.py).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
