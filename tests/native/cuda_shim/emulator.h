// Runs CUDA kernels on the CPU, for tests: blocks one after another, the threads of a block as fibers that switch at
// barriers. With LK_SHIM_THREADS they are std::threads instead, whose races ThreadSanitizer sees.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#ifdef LK_SHIM_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#elif !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx;

namespace shim {

constexpr int kWarp = 32;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_shim: %s\n", what);
  std::abort();
}

// A copy that cp.async started: it happens when it is waited for, so a missing wait shows.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, filled;
};

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
#ifdef LK_SHIM_THREADS
  std::mutex mutex;
  std::condition_variable released;
#endif
};

union Slot {
  unsigned char bytes[64];
  float as_float[16];
};

// What the lanes of a warp show each other. Two sides in turn: one barrier per exchange is enough.
struct Warp {
  Barrier barrier;
  Slot slots[2][kWarp];
};

struct Thread {
  dim3 index;
  int number = 0;
  Warp* warp = nullptr;
  unsigned exchanges = 0;
  bool done = false;
  bool at_barrier = false;  // of the block
  std::vector<AsyncCopy> copies;
  std::vector<size_t> groups;  // where each committed group of copies ends
#ifndef LK_SHIM_THREADS
  char* stack = nullptr;
#ifdef __x86_64__
  void* context = nullptr;
#else
  ucontext_t context;
#endif
#endif
};

struct State {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  std::vector<unsigned char> dynamic_shared;
  const std::function<void()>* kernel = nullptr;
  uint64_t idle = 0;  // switches since a barrier was last passed
  int live = 0;
  bool backwards = false;  // the order of a block's threads
};
inline State state;
inline uint64_t blocks_run = 0;

inline bool by_chance() {
  static uint32_t chance = 1;
  chance = chance * 1664525u + 1013904223u;
  return chance >> 31;
}

#ifdef LK_SHIM_THREADS

inline thread_local Thread* current = nullptr;

inline void wait(Barrier& barrier) {
  std::unique_lock<std::mutex> lock(barrier.mutex);
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.released.notify_all();
  } else {
    barrier.released.wait(lock, [&] { return barrier.generation != generation; });
  }
}
inline void wait_warp() { wait(current->warp->barrier); }
inline void wait_block() { wait(state.barrier); }

inline void run_block() {
  std::vector<std::thread> pool;
  for (Thread& thread : state.threads)
    pool.emplace_back([&thread] {
      current = &thread;
      (*state.kernel)();
    });
  for (std::thread& thread : pool) thread.join();
}

#else

inline Thread* current = nullptr;
constexpr size_t kStack = 128 << 10;

#ifdef __x86_64__
extern "C" void lk_shim_switch(void** save, void* load);
inline void* main_context = nullptr;
inline void switch_to(Thread& next) {
  Thread& before = *current;
  current = &next;
  lk_shim_switch(&before.context, next.context);
}
#else
inline ucontext_t main_context;
inline void switch_to(Thread& next) {
  Thread& before = *current;
  current = &next;
  swapcontext(&before.context, &next.context);
}
#endif

// Forwards or backwards, by chance: what is right in one order only lacks a barrier.
inline Thread& next_live(int begin, int end) {
  int i = current->number;
  do {
    if (state.backwards) i = i == begin ? end - 1 : i - 1;
    else i = i + 1 == end ? begin : i + 1;
  } while (state.threads[i].done);
  return state.threads[i];
}

inline void yield_to(Thread& next) {
  if (++state.idle > 4096 + 64u * state.threads.size() * state.threads.size())
    fail("a barrier is not reached by all threads");
  if (&next != current) switch_to(next);
}

// `next()` names the thread that runs while this one waits.
template <class Next>
inline void wait(Barrier& barrier, Next next) {
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    state.idle = 0;
  } else {
    while (barrier.generation == generation) yield_to(next());
  }
}
inline void wait_warp() {
  const int begin = current->number / kWarp * kWarp;
  wait(current->warp->barrier, [=]() -> Thread& { return next_live(begin, begin + kWarp); });
}
// A warp gets as far ahead as it can: all of its threads reach the barrier before those of other warps go on.
inline void wait_block() {
  const int begin = current->number / kWarp * kWarp, end = int(state.threads.size());
  current->at_barrier = true;
  wait(state.barrier, [=]() -> Thread& {
    for (int i = begin; i < begin + kWarp; ++i)
      if (Thread& mate = state.threads[i]; !mate.done && !mate.at_barrier) return mate;
    return next_live(0, end);
  });
  current->at_barrier = false;
}

inline void fiber() {
  (*state.kernel)();
  current->done = true;
  if (--state.live == 0) {
#ifdef __x86_64__
    void* unused;
    lk_shim_switch(&unused, main_context);
#else
    setcontext(&main_context);
#endif
  }
  if (state.barrier.arrived) fail("threads leave the kernel while others wait at __syncthreads");
  state.idle = 0;
  switch_to(next_live(0, int(state.threads.size())));
  fail("a finished thread runs");
}

inline void run_block() {
  state.live = int(state.threads.size());
  for (Thread& thread : state.threads) {
    thread.done = thread.at_barrier = false;
    if (!thread.stack) {
      void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) fail("no memory for stacks");
      thread.stack = static_cast<char*>(memory);
    }
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(thread.stack + kStack) - 2;  // where a call leaves its return address
    *top = reinterpret_cast<void*>(&fiber);
    thread.context = top - 6;  // the registers that lk_shim_switch takes from the stack
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
#endif
  }
  state.idle = 0;
  state.backwards = by_chance();
  current = &(state.backwards ? state.threads.back() : state.threads.front());
#ifdef __x86_64__
  lk_shim_switch(&main_context, current->context);
#else
  swapcontext(&main_context, &current->context);
#endif
}

#endif

// Shows `bytes` of every lane to the others; returns all lanes' slots.
inline const Slot* exchange(const void* mine, size_t bytes) {
  Warp& warp = *current->warp;
  Slot* slots = warp.slots[current->exchanges++ & 1];
  std::memcpy(slots[current->number % kWarp].bytes, mine, bytes);
  wait_warp();
  return slots;
}

// Of the threads from `first` on.
inline void release_stacks(size_t first) {
#ifndef LK_SHIM_THREADS
  for (size_t i = first; i < state.threads.size(); ++i)
    if (state.threads[i].stack) munmap(std::exchange(state.threads[i].stack, nullptr), kStack);
#endif
}

inline void prepare(dim3 block, size_t shared_bytes) {
  const size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > 1024 || count % kWarp) fail("blocks have 32 to 1024 threads, whole warps");
  if (shared_bytes > 227 << 10) fail("more than 227 KB of shared memory");
  if (state.threads.size() < count) {
    release_stacks(0);
    state.threads = std::vector<Thread>(count);
  } else {
    release_stacks(count);
    state.threads.resize(count);
  }
  state.warps = std::vector<Warp>(count / kWarp);
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = state.threads[i];
    thread.number = int(i);
    thread.index = dim3(unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y));
    thread.warp = &state.warps[i / kWarp];
    thread.warp->barrier.expected = kWarp;
    thread.exchanges = 0;
    thread.copies.clear();
    thread.groups.clear();
  }
  state.barrier.expected = int(count);
  state.barrier.arrived = 0;
  state.dynamic_shared.resize(shared_bytes + 128);
}

inline unsigned char* dynamic_shared() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(state.dynamic_shared.data());
  return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> kernel;
};

inline void run(const Launch& launch) {
  gridDim = launch.grid;
  blockDim = launch.block;
  state.kernel = &launch.kernel;
  prepare(launch.block, launch.shared_bytes);
  // Forwards or backwards, by chance: no block may count on another, nor overwrite what is not its own.
  const bool backwards = by_chance();
  const dim3 last(gridDim.x - 1, gridDim.y - 1, gridDim.z - 1);
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = backwards ? dim3(last.x - x, last.y - y, last.z - z) : dim3(x, y, z);
        std::memset(state.dynamic_shared.data(), 0xff, state.dynamic_shared.size());  // NaN
        ++blocks_run;
        run_block();
      }
}

// Kernels whose launches may overlap start last to first, each up to where it waits for those in front: what it reads until
// then is as old as it can be. They run when run_held() is called.
inline std::vector<Launch> held;
inline bool overlapping = false;  // a kernel that was held runs

inline void hold(Launch launch) { held.push_back(std::move(launch)); }

inline void run_held() {
  if (held.empty()) return;
  const Launch last = std::move(held.back());
  held.pop_back();
  overlapping = true;
  run(last);
  overlapping = false;
}

inline void wait_for_held() {
#ifndef LK_SHIM_THREADS
  if (!overlapping) return;
  wait_block();  // who leaves a kernel without having waited, fails here
  if (current->number == 0 && !held.empty()) {
    State outer;
    std::swap(outer, state);
    Thread* const thread = current;
    const dim3 place = blockIdx, grid = gridDim, block = blockDim;
    const auto context = main_context;
    run_held();
    release_stacks(0);
    std::swap(outer, state);
    current = thread, main_context = context, blockIdx = place, gridDim = grid, blockDim = block;
    overlapping = true;
  }
  wait_block();
#endif
}

inline void commit_copies() { current->groups.push_back(current->copies.size()); }

// Until at most `pending` groups are under way.
inline void finish_copies(size_t pending) {
  Thread& thread = *current;
  if (thread.groups.size() <= pending) return;
  const size_t groups = thread.groups.size() - pending, copies = thread.groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) {
    const AsyncCopy& copy = thread.copies[i];
    std::memcpy(copy.to, copy.from, size_t(copy.filled));
    std::memset(static_cast<char*>(copy.to) + copy.filled, 0, size_t(copy.bytes - copy.filled));
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + long(copies));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + long(groups));
  for (size_t& end : thread.groups) end -= copies;
}

}  // namespace shim
