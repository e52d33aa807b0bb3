"""What the TPU and GPU compilers make of kernels and programs: static reports."""
