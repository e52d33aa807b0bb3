// The kernels by AVX-512's instructions, products of bfloat16 by AMX's tiles.
#if defined(__x86_64__) && (__clang_major__ >= 12 || (!defined(__clang__) && __GNUC__ >= 11))
#define LEVEL amx
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16"
#define LANES 16
#define REGISTERS 32
#define ROWS 12
#define PORTION 12
#define QUERIES 6
#define DOTS 2
#include "level.h"
#else
#include "kernels.h"
const slipstream::Kernels* slipstream::amx() { return nullptr; }
#endif
