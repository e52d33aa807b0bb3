// The kernels by what every CPU of the compiler's target has: SSE2 on x86-64, NEON on 64-bit Arm.
#define LEVEL generic
#define LANES 4
#if defined(__aarch64__)
#define REGISTERS 28  // of 32; GCC moves sums to memory where they and their factors take more
#define ROWS 8
#define QUERIES 3
#else
#define REGISTERS 16
#define ROWS 4
#define QUERIES 2
#endif
#define PORTION ROWS
#define DOTS 0
#include "level.h"
