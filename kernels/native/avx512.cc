// The kernels by AVX-512's instructions.
#if defined(__x86_64__)
#define LEVEL avx512
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#define LANES 16
#define REGISTERS 32
#define ROWS 12
#define PORTION 12
#define QUERIES 6
#define DOTS 0
#include "level.h"
#else
#include "kernels.h"
const slipstream::Kernels* slipstream::avx512() { return nullptr; }
#endif
