// The kernels of one level, LEVEL, by the instructions that TARGET allows, or by what the compiler's target has. Included
// once in a file that defines:
//   LANES      floats of a vector
//   REGISTERS  vectors that are at hand
//   ROWS       of a product that codes are unpacked for on the way, their sums in registers
//   PORTION    rows that pass together over floats in the nearest cache
//   QUERIES    of a slot that share a row of the cache
//   DOTS       1 where there are dot products of bfloat16, 2 where there are tiles of it, else 0
// The pragmas stand behind the standard headers, whose functions any level may share.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PRAGMA(text) _Pragma(#text)
#define NAMED(level) #level
#define NAME(level) NAMED(level)

#if defined(TARGET) && defined(__clang__)
#define ALLOW(target_) PRAGMA(clang attribute push(__attribute__((target(target_))), apply_to = function))
ALLOW(TARGET)
#elif defined(TARGET)
#define ALLOW(target_) PRAGMA(GCC target(target_))
#pragma GCC push_options
ALLOW(TARGET)
#endif
namespace slipstream {
namespace {
#include "vectors.h"
#include "panel_matmul.h"
#include "ragged_attention.h"
#include "chunk_attention.h"
#include "rms_norm.h"
}  // namespace
#if defined(TARGET) && defined(__clang__)
#pragma clang attribute pop
#elif defined(TARGET)
#pragma GCC pop_options
#endif

const Kernels* LEVEL() {
  static const Kernels own{NAME(LEVEL), panels, dots, attend, attend_chunk, rms_norm};
  return &own;
}
}  // namespace slipstream
