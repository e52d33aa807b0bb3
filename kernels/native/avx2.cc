// The kernels by avx2's instructions. The pragmas stand behind the standard headers, whose functions any level may share.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LANES 8
#define ROWS 6   // of a product that stay in registers
#define QUERIES 3  // of a slot that share a row of the cache

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace slipstream {
namespace {
#include "vectors.h"
#include "panel_matmul.h"
#include "ragged_attention.h"
}  // namespace
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx2() {
  static const Kernels own{"avx2", panels, attend};
  return &own;
}
}  // namespace slipstream
#else
const slipstream::Kernels* slipstream::avx2() { return nullptr; }
#endif
