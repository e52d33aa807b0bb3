// Which level runs: the best that the CPU and its operating system allow.
#include <atomic>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

bool has_tiles() {
  constexpr unsigned XSAVE_IN_USE = 1u << 27, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, STATES = 1u << 17 | 1u << 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & XSAVE_IN_USE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & STATES) == STATES;
}

// Linux asks for it before a process' threads, those that run already among them, use tiles.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool is_allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return is_allowed;
#else
  return false;
#endif
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
  if (level == amx()) return has_avx512 && has_bf16() && has_tiles() && may_use_tiles();
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* level : {amx(), avx512_bf16(), avx512(), avx2()})
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
  for (const Kernels* level : {amx(), avx512_bf16(), avx512(), avx2(), generic()})
    if (level && !std::strcmp(level->name, name) && runs(level)) {
      chosen().store(level);
      return true;
    }
  return false;
}

}  // namespace slipstream
