// Shares an op's parts among threads of a pool that may be busy, or have none to spare.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace slipstream {

constexpr int SPINS = 2000;  // before a waiting thread gives its core away

inline void pause_a_little(int spins) {
  if (spins > SPINS) return std::this_thread::yield();
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Calls part(i) for each i below `parts`, and returns when all are done.
//
// The caller works too, and waits only for parts that some thread has begun: so nothing depends on when, or whether, the
// pool runs a task. A task that comes late finds no part left and touches nothing but its own copy of `part`, which must
// hold pointers and values alone.
template <typename Pool, typename Part>
void share(Pool& pool, int64_t threads, int64_t parts, Part part) {
  struct Work {
    Part part;
    int64_t parts;
    std::atomic<int64_t> next{0}, done{0};

    void take() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
        part(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  const int64_t helpers = std::min(threads, parts) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < parts; ++i) part(i);
    return;
  }
  auto work = std::shared_ptr<Work>(new Work{part, parts});
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->take(); });
  work->take();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < parts; ++spins) pause_a_little(spins);
}

}  // namespace slipstream
