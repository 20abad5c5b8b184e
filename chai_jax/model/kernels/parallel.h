// Work on XLA's threads, for cpu.cc and matrix_unit.cc.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

// run(0) ... run(count - 1) on XLA's threads and this one. Helpers that come too late find nothing left to do, and are
// not waited for: all threads may be here, each with helpers that no thread is free for. Few bytes are read sooner than
// a helper is awake.
constexpr int64_t kWorth = 1 << 18;  // bytes to read for each thread

template <typename Run>
void InParallel(xla::ffi::ThreadPool pool, int64_t count, int64_t bytes, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &run] {
    int64_t mine = 0;
    for (int64_t task; (task = shared->next.fetch_add(1)) < count; ++mine) run(task);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    if ((shared->done += mine) == count) shared->all_done.notify_one();
  };
  int64_t helpers = std::min<int64_t>({count, pool.num_threads(), bytes / kWorth}) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([work] { work(); });
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}
