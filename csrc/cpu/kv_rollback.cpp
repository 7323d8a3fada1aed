#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

// The window of one head of one layer's k or v, in bytes.
struct Window {
  char* data;
  int64_t stride;
  size_t row;
};

LK_INLINE void move_rows(const Window& window, const int32_t* path, int64_t keep, char* scratch) {
  int64_t first = 0;
  while (first < keep && path[first] == first) ++first;
  const size_t row = window.row;
  for (int64_t i = first; i < keep; ++i) memcpy(scratch + size_t(i) * row, window.data + path[i] * window.stride, row);
  for (int64_t i = first; i < keep; ++i) memcpy(window.data + i * window.stride, scratch + size_t(i) * row, row);
}

void change_caches(const KvRollbackArgs& a) {
  const int64_t size = int64_t(size_of(a.dtype)), heads = a.layers * a.b * a.g * 2;
  const int64_t parts = heads < a.num_threads ? heads : a.num_threads;
  const size_t part_bytes = size_t(a.window * a.d * size + 63) / 64 * 64;
  char* scratch = a.path ? static_cast<char*>(workspace(Workspace::kv_rollback, size_t(parts) * part_bytes)) : nullptr;
  auto task = [&](int64_t part) {
    for (int64_t head = part; head < heads; head += parts) {
      const bool value = head % 2;
      const int64_t g = head / 2 % a.g, b = head / 2 / a.g % a.b, layer = head / 2 / a.g / a.b;
      const int64_t slot = a.slot_ids ? a.slot_ids[b] : b, keep = a.keep[b];
      const int64_t* stride = value ? a.v_cache_stride : a.k_cache_stride;
      const int64_t first = layer * stride[0] + slot * stride[1] + g * stride[2] + a.lengths[b] * stride[3];
      const Window window{static_cast<char*>(value ? a.v_cache : a.k_cache) + first * size, stride[3] * size,
                          size_t(a.d * size)};
      if (a.path) move_rows(window, a.path + b * a.path_stride, keep, scratch + size_t(part) * part_bytes);
      if (a.scrub)
        for (int64_t i = keep; i < a.window; ++i) memset(window.data + i * window.stride, 0, window.row);
    }
  };
  parallel_for(a.num_threads, parts, task);
}

}  // namespace

void kv_rollback(const KvRollbackArgs& args) {
  if (args.b == 0) return;
  if (args.path || args.scrub) change_caches(args);
  for (int64_t b = 0; b < args.b; ++b) args.lengths[b] += args.keep[b];
}

}  // namespace lk::LK_VARIANT
