// Work on XLA's threads: for decode_cpu.cc and products_cpu.cc.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

namespace {

constexpr int64_t kWorth = 1 << 18;  // bytes to read for each thread: fewer are read sooner than a helper is awake

// run(0) ... run(count - 1) on the threads of `pool` and on this one. Returns whether all of them came to their end: an
// exception ends the run that throws it and nothing else, since on a thread of the pool it would end the process.
//
// Helpers that come too late find nothing left to do, and are not waited for: all threads may be here, each with helpers
// that no thread is free for.
template <typename Pool, typename Run>
bool InParallel(Pool& pool, int64_t count, int64_t bytes, const Run& run) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  std::shared_ptr<Shared> shared;
  try {
    shared = std::make_shared<Shared>();
  } catch (...) {
    return false;
  }
  auto work = [shared, count, &run] {
    int64_t mine = 0;
    for (int64_t task; (task = shared->next.fetch_add(1)) < count; ++mine) {
      try {
        run(task);
      } catch (...) {
        shared->failed = true;
      }
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    if ((shared->done += mine) == count) shared->all_done.notify_one();
  };
  try {
    const int64_t helpers = std::min<int64_t>({count, pool.num_threads(), bytes / kWorth}) - 1;
    for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule([work] { work(); });
  } catch (...) {
    // No memory to ask for more helpers: this thread does their part.
  }
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
  return !shared->failed;
}

}  // namespace
