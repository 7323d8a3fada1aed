#include "cpu/attention_tile.h"
#if defined(LK_VARIANT_AVX512_AMX)
#include "cpu/amx_attention.h"
#endif
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace lk::LK_VARIANT {
namespace {

constexpr int64_t kBlockRows = 64;                // query rows of a task
constexpr int64_t kPartialBytes = 8 << 20;        // scratch of the blocks in flight, unless one block needs more
constexpr int64_t kSerialProducts = 128 << 10;    // less is not worth a second thread
constexpr int64_t kHeader = 16;                   // floats before a partial's sums: the maximum and the sum

struct Range {
  int64_t begin, end;
};

LK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
LK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Query rows [first, first + rows) of one KV head of one sequence, counted over window rows and then heads of the group.
struct Block {
  int64_t b, g, first, rows;
  int64_t first_chunk, chunks;
  int64_t first_task;
  float* partials;  // [rows, chunks] of `maximum, sum, ..., d sums`
  int64_t left;     // chunks yet to be done
};

template <class T>
struct Call {
  const VerifyAttentionArgs& a;
  int64_t group;         // query heads of a KV head
  int64_t partial_size;  // floats

  int64_t window_rows(int64_t b) const { return a.num_queries ? a.num_queries[b] : a.t; }
  const bool* mask(int64_t t) const { return a.tree_mask + t * a.tree_mask_stride; }

  // Storage positions that row t may see; with a tree mask, some in between it may not.
  Range visible(int64_t b, int64_t t) const {
    const int64_t length = a.lengths[b];
    int64_t last = t;
    if (a.tree_mask)
      for (last = window_rows(b) - 1; last > t && !mask(t)[last];) --last;
    return {a.sliding_window ? most(0, length + t + 1 - a.sliding_window) : 0, length + last + 1};
  }
  bool sees(int64_t b, int64_t t, int64_t j) const { return j < a.lengths[b] || mask(t)[j - a.lengths[b]]; }

  float* partial(const Block& block, int64_t row, int64_t chunk) const {
    return block.partials + ((row - block.first) * block.chunks + chunk - block.first_chunk) * partial_size;
  }

  const T* query(const Block& block, int64_t row) const {
    const int64_t t = row / group, h = block.g * group + row % group;
    return static_cast<const T*>(a.q) + block.b * a.q_stride[0] + t * a.q_stride[1] + h * a.q_stride[2];
  }
  // The chunk's first row of a cache.
  const T* cached(const void* cache, const int64_t* stride, const Block& block, int64_t chunk) const {
    const int64_t slot = a.slot_ids ? a.slot_ids[block.b] : block.b;
    return static_cast<const T*>(cache) + slot * stride[0] + block.g * stride[1] + chunk * kChunk * stride[2];
  }

  // What `count` rows from `first` on see of a chunk, as offsets in it, each to seen[i]. Keys that every row sees are `all`;
  // with a tree mask, only those in front of the window.
  struct Ranges {
    Range any, all;
  };
  __attribute__((always_inline)) Ranges ranges(const Block& block, int64_t chunk, int64_t first, int64_t count, Range* seen) const {
    const int64_t base = chunk * kChunk;
    Range any{kChunk, 0}, all{0, kChunk};
    for (int64_t i = 0; i < count; ++i) {
      const Range positions = visible(block.b, (first + i) / group);
      seen[i] = {most(positions.begin - base, 0), least(positions.end - base, kChunk)};
      any = {least(any.begin, seen[i].begin), most(any.end, seen[i].end)};
      all = {most(all.begin, seen[i].begin), least(all.end, seen[i].end)};
    }
    if (a.tree_mask) all.end = least(all.end, most(a.lengths[block.b] - base, 0));
    if (all.begin >= all.end) all = {any.end, any.end};
    return {any, all};
  }
  // A row's scores p become exponentials, of the keys it sees; their maximum and sum go to its partial.
  __attribute__((always_inline)) void exponentials(const Block& block, int64_t chunk, int64_t row, Range seen, float* p) const {
    const int64_t base = chunk * kChunk;
    if (a.tree_mask)
      for (int64_t j = most(seen.begin, a.lengths[block.b] - base); j < seen.end; ++j)
        if (!sees(block.b, row / group, base + j)) p[j] = -__builtin_inff();
    const Softmax s = seen.begin < seen.end ? softmax(p, a.scale, seen.begin, seen.end) : Softmax{kNothing, 0};
    float* result = partial(block, row, chunk);
    result[0] = s.max;
    result[1] = s.sum;
  }

  template <int kRows>
  void tile(const Block& block, int64_t chunk, int64_t first) const;
#if defined(LK_VARIANT_AVX512_AMX)
  void run_tiles(const Block& block, int64_t chunk) const;
#endif
  void run_chunk(const Block& block, int64_t chunk) const;
  void merge_row(const Block& block, int64_t row) const;
  int64_t list_blocks(Block* blocks) const;
  void zero_idle_rows() const;
  void run() const;
};

template <class T>
template <int kRows>
void Call<T>::tile(const Block& block, int64_t chunk, int64_t first) const {
  const int64_t base = chunk * kChunk;
  Tile<T> tile;
  Range range[kRows];
  const Ranges shown = ranges(block, chunk, first, kRows, range);
  const Range any = shown.any, all = shown.all;
  if (any.begin >= any.end) return;

  for (int i = 0; i < kRows; ++i) pack_row(query(block, first + i), a.d, tile.q[i]);
  const T* k = cached(a.k_cache, a.k_cache_stride, block, chunk);
  const T* v = cached(a.v_cache, a.v_cache_stride, block, chunk);
  const int64_t v_stride = a.v_cache_stride[2];
  score<T, kRows>(tile, k, a.k_cache_stride[2], first == block.first ? v : nullptr, v_stride, a.d,
                  any.begin, any.end);

  for (int i = 0; i < kRows; ++i) {
    tile.sums[i] = partial(block, first + i, chunk) + kHeader;
    for (int64_t c = 0; c < a.d; c += kWidth) store(tile.sums[i] + c, zero());
    exponentials(block, chunk, first + i, range[i], tile.p[i]);
  }

  // Keys that every row sees share their loads; the others may hold anything where a row does not see them.
  auto own = [&](int i, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end;) {
      int64_t stop = j;
      while (stop < end && (!a.tree_mask || sees(block.b, (first + i) / group, base + stop))) ++stop;
      if (stop > j) add_values<T, 1>(tile, i, v, v_stride, a.d, j, stop);
      j = stop + 1;
    }
  };
  for (int i = 0; i < kRows; ++i) own(i, range[i].begin, least(range[i].end, all.begin));
  if (all.begin < all.end) add_values<T, kRows>(tile, 0, v, v_stride, a.d, all.begin, all.end);
  for (int i = 0; i < kRows; ++i) own(i, most(range[i].begin, all.end), range[i].end);
}

#if defined(LK_VARIANT_AVX512_AMX)
// All rows of a block over one chunk. Keys that a row does not see have the weight 0 there; where one that others see has a
// V that is not finite, each row has its V without it.
template <>
void Call<bf16>::run_tiles(const Block& block, int64_t chunk) const {
  const bf16* k = cached(a.k_cache, a.k_cache_stride, block, chunk);
  const bf16* v = cached(a.v_cache, a.v_cache_stride, block, chunk);
  Range range[kBlockRows];
  const Ranges shown = ranges(block, chunk, block.first, block.rows, range);
  const Range any = shown.any, all = shown.all;
  if (any.begin >= any.end) return;

  AttentionTiles tiles;
  tiles.pack_values(v, a.v_cache_stride[2], a.d, any.begin, any.end, [](int64_t) { return true; });
  const auto finite = [&](int64_t begin, int64_t end) {
    vf none = zero();
    for (int64_t j = begin; j < end; ++j)
      for (int64_t c = 0; c < a.d; c += kWidth) {
        const bf16* p = v + j * a.v_cache_stride[2] + c;
        none = fma(a.d - c < kWidth ? load(p, a.d - c) : load(p), zero(), none);
      }
    return sum(none) == 0;
  };
  const bool shared = finite(any.begin, all.begin) && finite(all.end, any.end);
  for (int64_t first = 0; first < block.rows; first += kTile) {
    const int64_t rows = least(kTile, block.rows - first);
    tiles.pack_queries(rows, a.d, [&](int64_t i) { return query(block, block.first + first + i); });
    tiles.score(k, a.k_cache_stride[2], a.d, any.begin, any.end);
    for (int64_t i = 0; i < rows; ++i) {
      const Range seen = range[first + i];
      exponentials(block, chunk, block.first + first + i, seen, tiles.p[i]);
      tiles.split(i, seen.begin, seen.end, any.begin, any.end);
    }
    const int64_t stride = block.chunks * partial_size;
    float* sums = partial(block, block.first + first, chunk) + kHeader;
    if (shared) {
      tiles.weigh(0, rows, a.d, any.begin, any.end, sums, stride);
      continue;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const Range seen = range[first + i];
      const int64_t t = (block.first + first + i) / group;
      tiles.pack_values(v, a.v_cache_stride[2], a.d, any.begin, any.end, [&](int64_t j) {
        return j >= seen.begin && j < seen.end && (!a.tree_mask || sees(block.b, t, chunk * kChunk + j));
      });
      tiles.weigh(i, 1, a.d, any.begin, any.end, sums + i * stride, stride);
    }
  }
}
#endif

template <class T>
void Call<T>::run_chunk(const Block& block, int64_t chunk) const {
#if defined(LK_VARIANT_AVX512_AMX)
  if constexpr (std::is_same_v<T, bf16>) return run_tiles(block, chunk);
#endif
  const int64_t end = block.first + block.rows;
  for (int64_t row = block.first; row < end; row += kTileRows) {
    switch (least(end - row, kTileRows)) {
      case 1: tile<1>(block, chunk, row); break;
      case 2: tile<2>(block, chunk, row); break;
      case 3: tile<3>(block, chunk, row); break;
      default: tile<kTileRows>(block, chunk, row);
    }
  }
}

template <class T>
void Call<T>::merge_row(const Block& block, int64_t row) const {
  const int64_t t = row / group, h = block.g * group + row % group;
  const Range seen = visible(block.b, t);
  const int64_t first = seen.begin / kChunk, last = (seen.end - 1) / kChunk;
  float maximum = kNothing;
  for (int64_t c = first; c <= last; ++c) {
    const float m = partial(block, row, c)[0];
    if (!(m <= maximum)) maximum = m;
  }
  vf total = zero();
  for (int64_t c = first; c <= last; ++c) {
    float* p = partial(block, row, c);
    const vf weight = exp(set1(p[0] - maximum));
    total = fma(weight, set1(p[1]), total);
    store(p, weight);  // into the header, in place of the maximum and the sum
  }
  T* out = static_cast<T*>(a.out) + block.b * a.out_stride[0] + t * a.out_stride[1] + h * a.out_stride[2];
  const auto merged = [&](int64_t column) {
    vf s = zero();
    for (int64_t c = first; c <= last; ++c) {
      const float* p = partial(block, row, c);
      s = fma(load(p), load(p + kHeader + column), s);
    }
    return div(s, total);
  };
#if defined(LK_VARIANT_AVX512_AMX)
  if constexpr (std::is_same_v<T, bf16>) {
    for (int64_t c = 0; c < a.d; c += 2 * kWidth) store_even_odd(out + c, merged(c), merged(c + kWidth), a.d - c);
    return;
  }
#endif
  for (int64_t column = 0; column < a.d; column += kWidth) {
    const vf s = merged(column);
    if (a.d - column >= kWidth) store(out + column, s);
    else store(out + column, s, a.d - column);
  }
}

// The number of blocks; writes them unless `blocks` is null.
template <class T>
int64_t Call<T>::list_blocks(Block* blocks) const {
  int64_t count = 0;
  for (int64_t b = 0; b < a.b; ++b) {
    const int64_t rows = window_rows(b) * group;
    for (int64_t g = 0; g < a.g; ++g)
      for (int64_t first = 0; first < rows; first += kBlockRows, ++count) {
        if (!blocks) continue;
        const int64_t n = least(kBlockRows, rows - first);
        const int64_t t = first / group, last_t = (first + n - 1) / group;
        int64_t end = 0;
        for (int64_t i = a.tree_mask ? t : last_t; i <= last_t; ++i) end = most(end, visible(b, i).end);
        const int64_t chunk = visible(b, t).begin / kChunk;
        blocks[count] = {b, g, first, n, chunk, (end - 1) / kChunk + 1 - chunk, 0, nullptr, 0};
      }
  }
  return count;
}

template <class T>
void Call<T>::zero_idle_rows() const {
  for (int64_t b = 0; b < a.b; ++b)
    for (int64_t t = window_rows(b); t < a.t; ++t)
      for (int64_t h = 0; h < a.h; ++h)
        memset(static_cast<T*>(a.out) + b * a.out_stride[0] + t * a.out_stride[1] + h * a.out_stride[2], 0,
               size_t(a.d) * sizeof(T));
}

template <class T>
void Call<T>::run() const {
  zero_idle_rows();
  const int64_t count = list_blocks(nullptr);
  Block* blocks = static_cast<Block*>(workspace(Workspace::attention_blocks, size_t(count) * sizeof(Block)));
  list_blocks(blocks);
  int64_t total = 0, largest = 0;  // floats
  for (int64_t i = 0; i < count; ++i) {
    const int64_t size = blocks[i].rows * blocks[i].chunks * partial_size;
    total += size;
    largest = most(largest, size);
  }
  const int64_t room = least(total, most(largest, kPartialBytes / int64_t(sizeof(float))));
  float* partials = static_cast<float*>(workspace(Workspace::attention_partials, size_t(room) * sizeof(float)));
  const int threads = total / partial_size * kChunk * a.d < kSerialProducts ? 1 : a.num_threads;

  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    int64_t tasks = 0;
    for (int64_t used = 0; end < count; ++end) {
      Block& block = blocks[end];
      const int64_t size = block.rows * block.chunks * partial_size;
      if (used + size > room) break;
      block.first_task = tasks;
      block.partials = partials + used;
      block.left = block.chunks;
      tasks += block.chunks;
      used += size;
    }
    auto task = [&](int64_t index) {
      int64_t low = begin, high = end;  // the block that holds the task
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (blocks[middle].first_task <= index ? low : high) = middle;
      }
      Block& block = blocks[low];
      run_chunk(block, block.first_chunk + index - block.first_task);
      if (__atomic_sub_fetch(&block.left, 1, __ATOMIC_ACQ_REL) == 0)
        for (int64_t row = block.first; row < block.first + block.rows; ++row) merge_row(block, row);
    };
    parallel_for(threads, tasks, task);
  }
}

template <class T>
void run(const VerifyAttentionArgs& a) {
  Call<T>{a, a.h / a.g, kHeader + (a.d + 31) / 32 * 32}.run();
}

}  // namespace

void verify_attention(const VerifyAttentionArgs& args) {
  if (args.b == 0 || args.t == 0) return;
  switch (args.dtype) {
    case DType::f32: return run<float>(args);
    case DType::f16: return run<f16>(args);
    case DType::bf16: return run<bf16>(args);
  }
}

}  // namespace lk::LK_VARIANT
