#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lk {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kMaxThreads = 1024;
constexpr auto kLongSpin = std::chrono::microseconds(150);  // while jobs follow each other
constexpr auto kShortSpin = std::chrono::microseconds(5);   // after a pause

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

thread_local bool t_inside = false;  // this thread is running a task, or waiting for its own job

// One word describes the current job, so that a worker joins it in one compare-and-swap or not at all. A worker that
// wakes up late finds the job closed: the caller waits only for workers that joined.
//   [job number : 32][open : 1][workers wanted : 15][workers joined : 16]
constexpr uint64_t kOpen = uint64_t(1) << 31;
constexpr uint64_t job_of(uint64_t state) { return state >> 32; }
constexpr int wanted_of(uint64_t state) { return int(state >> 16 & 0x7fff); }
constexpr int joined_of(uint64_t state) { return int(state & 0xffff); }

class Pool {
 public:
  ~Pool() { stop(); }

  // False when another thread is using the pool.
  bool run(int num_threads, int64_t num_tasks, TaskFunction function, void* context) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn || stopping_.load(std::memory_order_relaxed)) return false;
    const int wanted = int(std::min<int64_t>(std::min(num_threads, kMaxThreads), num_tasks)) - 1;
    grow(wanted);
    function_ = function;
    context_ = context;
    num_lanes_ = wanted + 1;
    for (int i = 0; i < num_lanes_; ++i) {
      lanes_[i].next.store(num_tasks * i / num_lanes_, std::memory_order_relaxed);
      lanes_[i].end = num_tasks * (i + 1) / num_lanes_;
    }
    left_.store(0, std::memory_order_relaxed);
    const uint64_t job = (job_of(state_.load(std::memory_order_relaxed)) + 1) & 0xffffffff;
    state_.store(job << 32 | kOpen | uint64_t(wanted) << 16);
    for (int i = 0; i < wanted && i < int(workers_.size()); ++i)
      if (workers_[i]->asleep.load()) workers_[i]->notify();
    work(0);
    const int joined = joined_of(state_.fetch_and(~kOpen, std::memory_order_acq_rel));
    for (int spins = 0; left_.load(std::memory_order_acquire) != joined; ++spins) {
      if (spins < 4000) pause(); else sched_yield();
    }
    return true;
  }

  int size() const { return size_.load(std::memory_order_relaxed); }

  void stop() {
    std::lock_guard<std::mutex> turn(turn_);
    stopping_.store(true);
    for (auto& worker : workers_) worker->notify();
    for (auto& worker : workers_) worker->thread.join();
    workers_.clear();
  }

 private:
  struct alignas(64) Worker {
    std::atomic<bool> asleep{false};
    std::mutex mutex;
    std::condition_variable wake;
    std::thread thread;

    void notify() {
      { std::lock_guard<std::mutex> lock(mutex); }  // it is now either waiting or yet to look at its condition
      wake.notify_one();
    }
  };

  // A thread's own tasks follow each other in memory, too; who is done early helps the others.
  struct alignas(64) Lane {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void work(int own) {
    for (int i = 0; i < num_lanes_; ++i) {
      Lane& lane = lanes_[(own + i) % num_lanes_];
      for (int64_t task; (task = lane.next.fetch_add(1, std::memory_order_relaxed)) < lane.end;)
        function_(context_, task);
    }
  }

  void grow(int wanted) {
    if (int(lanes_.size()) <= wanted) lanes_ = std::vector<Lane>(size_t(wanted) + 1);
    if (int(workers_.size()) >= wanted || refused_) return;
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      while (int(workers_.size()) < wanted) {
        auto worker = std::make_unique<Worker>();
        worker->thread = std::thread([this, self = worker.get(), index = int(workers_.size())] { loop(*self, index); });
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error&) {
      refused_ = true;  // a limit on threads: the ones that started do all the work, with the same result
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    size_.store(int(workers_.size()), std::memory_order_relaxed);
  }

  void loop(Worker& self, int index) {
    t_inside = true;
    uint64_t seen = 0;  // the last job this worker looked at; jobs count from 1
    for (auto spin = kLongSpin;;) {
      const auto idle_since = Clock::now();
      uint64_t state = wait(self, index, seen, idle_since + spin);
      if (stopping_.load()) return;
      seen = job_of(state);
      if (index >= wanted_of(state)) {
        spin = kShortSpin;
        continue;
      }
      spin = Clock::now() - idle_since < kLongSpin ? kLongSpin : kShortSpin;
      while (job_of(state) == seen && (state & kOpen)) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel, std::memory_order_relaxed)) {
          work(index + 1);
          left_.fetch_add(1, std::memory_order_release);
          break;
        }
      }
    }
  }

  // The state once it holds a job other than `seen`, or anything when stopping.
  uint64_t wait(Worker& self, int index, uint64_t seen, Clock::time_point spin_until) {
    do {
      for (int i = 0; i < 32; ++i) {
        const uint64_t state = state_.load(std::memory_order_acquire);
        if (job_of(state) != seen) return state;
        pause();
      }
    } while (Clock::now() < spin_until);
    std::unique_lock<std::mutex> lock(self.mutex);
    self.asleep.store(true);
    uint64_t state;
    self.wake.wait(lock, [&] {
      state = state_.load();
      return (job_of(state) != seen && index < wanted_of(state)) || stopping_.load();
    });
    self.asleep.store(false);
    return state;
  }

  std::mutex turn_;  // held by the caller whose job runs
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> size_{0};
  bool refused_ = false;

  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> left_{0};
  std::vector<Lane> lanes_;
  int num_lanes_ = 0;
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;

  std::atomic<bool> stopping_{false};
};

std::atomic<Pool*> g_pool{nullptr};

Pool& pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current) return *current;
  static const bool hooks = [] {
    // The child of a fork has none of the workers, and maybe locked mutexes: it leaves them behind and starts afresh.
    pthread_atfork(nullptr, nullptr, [] {
      g_pool.store(nullptr);
      t_inside = false;
    });
    // The pool itself stays, for threads that outlive the end of main.
    std::atexit([] {
      if (Pool* last = g_pool.load()) last->stop();
    });
    return true;
  }();
  (void)hooks;
  auto made = std::make_unique<Pool>();
  if (g_pool.compare_exchange_strong(current, made.get())) return *made.release();
  return *current;
}

}  // namespace

void parallel_for_raw(int num_threads, int64_t num_tasks, TaskFunction function, void* context) {
  if (num_threads > 1 && num_tasks > 1 && !t_inside) {
    t_inside = true;
    const bool done = pool().run(num_threads, num_tasks, function, context);
    t_inside = false;
    if (done) return;
  }
  for (int64_t task = 0; task < num_tasks; ++task) function(context, task);
}

int pool_size() {
  const Pool* current = g_pool.load(std::memory_order_acquire);
  return current ? current->size() : 0;
}

}  // namespace lk
