// Shares the items of a loop among the caller and XLA's threads.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace jaxserve {

// Calls body(i) once for each i in [0, count), in any order, and returns when all calls have.
//
// Whoever is free takes the next item. The caller takes items too and waits for those alone that others have begun, so
// that it ends even where no other thread ever comes: a helper that comes late finds nothing left, and touches nothing.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, body = &body] {
    int64_t mine = 0;
    for (int64_t i; (i = progress->next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) (*body)(i);
    progress->done.fetch_add(mine, std::memory_order_release);
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < count; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

}  // namespace jaxserve
