// The kernels by what every CPU of the compiler's target has: SSE2 on x86-64, NEON on 64-bit Arm.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

#define LANES 4
#if defined(__aarch64__)
#define ROWS 8
#define QUERIES 3
#else
#define ROWS 4
#define QUERIES 2
#endif

namespace slipstream {
namespace {
#include "vectors.h"
#include "panel_matmul.h"
#include "ragged_attention.h"
}  // namespace

const Kernels* generic() {
  static const Kernels own{"generic", panels, attend};
  return &own;
}
}  // namespace slipstream
