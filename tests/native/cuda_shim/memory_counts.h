// How a kernel uses memory, counted while its PTX runs (ptx.h): what each access of a warp costs beside the least that its
// bytes need. Global memory is read and written in sectors of 32 bytes. Shared memory has 32 banks of 4 bytes, and a cycle
// serves one word of each: to all lanes of a warp, to half of them where each asks for 8 bytes, to a quarter for 16.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "emulator.h"

namespace memory_counts {

struct Access {
  uint64_t address;
  uint32_t bytes, lane;
};
struct Totals {
  uint64_t accesses = 0, cost = 0, least = 0;  // of warps; sectors or cycles
};
using Place = std::tuple<const char*, int, bool>;  // kernel, line of its C++, shared memory

inline bool counting = false;
inline std::map<Place, Totals> totals;
// Of the block that runs: an instruction's n-th execution by the lanes of a warp is one access.
inline std::map<std::tuple<Place, int, unsigned>, std::vector<Access>> open;  // place, warp, n
inline std::map<std::pair<Place, int>, unsigned> executions;                  // place, thread
inline uint64_t block = 0;

inline uint64_t shared_cycles(const std::vector<Access>& lanes) {
  const uint32_t together = lanes[0].bytes >= 16 ? 8 : lanes[0].bytes >= 8 ? 16 : 32;
  std::map<std::pair<uint32_t, uint32_t>, std::set<uint64_t>> words;  // part of the warp, bank
  for (const Access& access : lanes)
    for (uint64_t word = access.address / 4; word <= (access.address + access.bytes - 1) / 4; ++word)
      words[{access.lane / together, uint32_t(word % 32)}].insert(word);
  std::map<uint32_t, size_t> most;  // of a part's banks
  for (const auto& [place, held] : words) most[place.first] = std::max(most[place.first], held.size());
  uint64_t cycles = 0;
  for (const auto& [part, count] : most) cycles += count;
  return cycles;
}

inline void close_block() {
  for (const auto& [key, lanes] : open) {
    const Place& place = std::get<0>(key);
    std::set<uint64_t> bytes, sectors, words;
    for (const Access& access : lanes)
      for (uint64_t at = access.address; at < access.address + access.bytes; ++at)
        bytes.insert(at), sectors.insert(at / 32), words.insert(at / 4);
    Totals& total = totals[place];
    ++total.accesses;
    total.cost += std::get<2>(place) ? shared_cycles(lanes) : sectors.size();
    total.least += std::get<2>(place) ? (words.size() + 31) / 32 : (bytes.size() + 31) / 32;
  }
  open.clear(), executions.clear();
}

inline void access(bool shared, uint64_t address, uint32_t bytes, const char* kernel, int line) {
  if (!counting || bytes == 0) return;
#ifndef LK_SHIM_THREADS
  const uint64_t stack = reinterpret_cast<uint64_t>(shim::current->stack);
  if (!shared && address >= stack && address < stack + shim::kStack) return;  // the kernel's argument
#endif
  if (std::exchange(block, shim::blocks_run) != shim::blocks_run) close_block();
  const Place place{kernel, line, shared};
  const int thread = shim::current->number;
  const unsigned n = executions[{place, thread}]++;
  open[{place, thread / 32, n}].push_back({address, bytes, uint32_t(thread % 32)});
}

}  // namespace memory_counts

extern "C" __attribute__((visibility("default"), used)) inline void count_memory(bool on) {
  memory_counts::counting = on;
}

// Writes a line per place, and begins anew: kernel, line, 1 for shared memory, accesses, cost, least.
extern "C" __attribute__((visibility("default"), used)) inline void write_memory_counts(const char* path) {
  using namespace memory_counts;
  close_block();
  if (std::FILE* file = std::fopen(path, "w")) {
    for (const auto& [place, total] : totals)
      std::fprintf(file, "%s %d %d %llu %llu %llu\n", std::get<0>(place), std::get<1>(place),
                   int(std::get<2>(place)), (unsigned long long)total.accesses, (unsigned long long)total.cost,
                   (unsigned long long)total.least);
    std::fclose(file);
  }
  totals.clear();
}
