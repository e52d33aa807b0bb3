// Which level runs: the best that the CPU and its operating system allow.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace slipstream {
namespace {

bool runs(const Kernels* level) {
  if (!level) return false;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == avx2()) return has_avx2;
  if (level == avx512())
    return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* level : {avx512(), avx2()})
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
  for (const Kernels* level : {avx512(), avx2(), generic()})
    if (level && !std::strcmp(level->name, name) && runs(level)) {
      chosen().store(level);
      return true;
    }
  return false;
}

}  // namespace slipstream
