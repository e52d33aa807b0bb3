// The kernels by AVX-512's instructions with its dot products of bfloat16.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define LEVEL avx512_bf16
#define TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16"
#define LANES 16
#define REGISTERS 32
#define ROWS 12
#define PORTION 12
#define QUERIES 6
#define DOTS 1
#include "level.h"
#else
#include "kernels.h"
const slipstream::Kernels* slipstream::avx512_bf16() { return nullptr; }
#endif
