// Shares an op's parts among threads of a pool that may be busy, or have none to spare.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

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
// A thread begins with a run of parts of its own, one behind another: what a part fetches ahead is its thread's next one.
// Then it takes what is left of the others' runs.
//
// The caller works too, and waits only for parts that some thread has begun: so nothing depends on when, or whether, the
// pool runs a task. A task that comes late finds no part left and touches nothing but its own copy of `part`, which must
// hold pointers and values alone.
template <typename Pool, typename Part>
void share(Pool& pool, int64_t threads, int64_t parts, Part part) {
  const int64_t workers = std::min(threads, parts);
  if (workers < 2) {
    for (int64_t i = 0; i < parts; ++i) part(i);
    return;
  }
  struct alignas(64) Run {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Work {
    Part part;
    std::vector<Run> runs;
    std::atomic<int64_t> done{0};

    void take(size_t own) {
      for (size_t k = 0; k < runs.size(); ++k) {
        Run& run = runs[(own + k) % runs.size()];
        int64_t taken = 0;
        for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end; ++taken) part(i);
        done.fetch_add(taken, std::memory_order_release);
      }
    }
  };
  auto work = std::shared_ptr<Work>(new Work{part, std::vector<Run>(workers)});
  for (int64_t i = 0; i < workers; ++i) {
    work->runs[i].next = parts * i / workers;
    work->runs[i].end = parts * (i + 1) / workers;
  }
  for (int64_t i = 1; i < workers; ++i) pool.Schedule([work, i] { work->take(i); });
  work->take(0);
  for (int spins = 0; work->done.load(std::memory_order_acquire) < parts; ++spins) pause_a_little(spins);
}

}  // namespace slipstream
