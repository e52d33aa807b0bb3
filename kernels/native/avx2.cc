// The kernels by AVX2's instructions.
#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET "avx2,fma,f16c"
#define LANES 8
#define REGISTERS 16
#define ROWS 8
#define PORTION 3
#define QUERIES 3
#define DOTS 0
#include "level.h"
#else
#include "kernels.h"
const slipstream::Kernels* slipstream::avx2() { return nullptr; }
#endif
