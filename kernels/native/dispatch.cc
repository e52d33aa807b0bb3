// Which level runs: the best that the CPU and its operating system allow.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace slipstream {
namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

bool runs(const Kernels* level) {
  if (!level) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (level == avx2()) return has_avx2;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (level == avx512()) return has_avx512;
  if (level == avx512_bf16()) return has_avx512 && has_bf16();
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* level : {avx512_bf16(), avx512(), avx2()})
    if (runs(level)) return level;
  return generic();
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> level{best()};
  return level;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_level(const char* name) {
  for (const Kernels* level : {avx512_bf16(), avx512(), avx2(), generic()})
    if (level && !std::strcmp(level->name, name) && runs(level)) {
      chosen().store(level);
      return true;
    }
  return false;
}

}  // namespace slipstream
