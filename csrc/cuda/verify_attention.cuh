// verify_attention, flash-decoding style: a block takes 16 or 32 query rows (the query heads of one KV head x rows of the
// window) and one chunk of the cache, in tiles of 64 keys; a warp 16 of the rows and 16 of a tile's keys. A second launch
// merges a row's chunks. K and V come by cp.async, the next tile while this one is computed; blocks that need the same chunk
// for other rows are neighbours in the grid, so that they find it in the L2 cache.
//
// The order of a row's sums is a function of its position, its sliding window and (h, g, d, dtype): chunks start at absolute
// multiples of their size, which doubles with the row's own position so that `slots` of them are enough; where it doubles
// inside a window, the rows before and after get a pass each. Tiles follow in rising order; one that a row does not see
// leaves its sums alone. Warps, then chunks, are merged in rising order.
//
// Positions that only some rows see may hold Inf or NaN in V, and 0 x NaN would poison the rest: there they are taken out,
// and the rows that see them become NaN. So that this shows nowhere else, a row that sees one anywhere is NaN throughout.
//
// Bound by bytes: 2 g d (lengths + t) itemsize of K and V; 4 t h d (lengths + t) operations. Expected on an H100
// (3.35 TB/s, 989 TFLOP/s), estimates: bf16, h = 32, g = 8, d = 128, b = 1, t = 7, 16384 positions: 67 MB, 1.9 GFLOP, 27 us;
// d = 64, b = 16, t = 1, 4096 positions: 134 MB, 0.5 GFLOP, 47 us. Under way per multiprocessor: one tile of K and V in each
// resident block, 33 KB at d = 128 in three blocks, where 20 KB are needed (linear_tile.cuh).
#pragma once

#include "cuda/attention_tile.cuh"

namespace lk::cuda {

constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = 32 * kMergeWarps;
constexpr int kNoWindow = 1 << 30;

struct AttentionLaunch {
  VerifyAttentionArgs args;
  int64_t first_batch, first_row, rows;  // window rows [first_row, first_row + rows) of the sequences from first_batch on
  int slots, slots_held;                 // chunks of a row; of them in scratch
  int row_blocks;                        // blocks that share a chunk
  int sliding_window, slack;             // slack: positions behind a row's own that it may see
  bool wide, wide_q;  // rows of the caches, of q, start at multiples of 16 bytes
  float* sums;   // [sequence, row, h, slots_held, d]
  float* stats;  // [sequence, row, h, slots_held, 2]
};

// Smallest kMinChunk x 2^i of which `slots` chunks cover `span` positions, wherever they start.
__device__ __forceinline__ int chunk_size(int span, int slots) {
  unsigned size = unsigned(span - 1) / unsigned((slots - 1) * kMinChunk);
#pragma unroll
  for (int i = 1; i < 32; i *= 2) size |= size >> i;
  return int(size + 1) * kMinChunk;
}

struct RowChunks {
  RowView view;
  int size;
};

__device__ __forceinline__ RowChunks chunks_of(const AttentionLaunch& a, int length, int queries, int t) {
  const int position = length + t;
  const int end = a.args.tree_mask ? length + queries : position + 1;
  return {{max(position + 1 - a.sliding_window, 0), end, t},
          chunk_size(min(position + 1, a.sliding_window) + a.slack, a.slots)};
}

__device__ __forceinline__ int queries_of(const VerifyAttentionArgs& a, int64_t b) {
  return a.num_queries ? a.num_queries[b] : int(a.t);
}

template <class T, int kMaxDim, int kRowTiles>
struct AttentionBlock {
  using Tile = AttentionTile<T, kMaxDim>;
  static constexpr int kThreads = 32 * kKeyGroups * kRowTiles;
  static constexpr int kRows = kQueryRows * kRowTiles;
  static constexpr int kVectors = kMaxDim / kVector<T>;   // of a key or a query row, a thread each
  static constexpr int kTogether = kThreads / kVectors;  // rows whose vectors the block copies at once
  // Wide rows have no second stage: two blocks on a multiprocessor overlap as well, and 99 KB hold all but float32 at 256.
  static constexpr int kStages = sizeof(T) * kMaxDim >= 512 ? 1 : 2;
  static constexpr int kResident = sizeof(T) == 4 || kMaxDim > 128 || kRowTiles > 1 ? 2 : kMaxDim > 64 ? 3 : 4;  // at least
  static constexpr int kKv = kTileKeys * Tile::kStride;  // elements of a tile of K, or of V

  struct Shared {
    T q[kRows * Tile::kStride];
    float scratch[kRowTiles * kKeyGroups * Tile::kScratch + 4];
    float stats[kRowTiles][kKeyGroups][kQueryRows][2];
    float shares[kKeyGroups][kRows];  // what the sums over a group of keys count
    RowChunks rows[kRows];
    int64_t places[kRows];  // of a row's first chunk in AttentionLaunch::sums
    int wanted[kRows];      // the chunk is the row's
    int bad[kRows];         // a sum is not finite
    union {
      T kv[kStages][2][kKv];
      float sums[kRowTiles][kKeyGroups][kQueryRows][Tile::kSumStride];
    };
  };
};

// Starts a copy of 16 bytes, of zeros if they are not real. `wide`: `from` is a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void copy_vector(T* to, const T* from, bool real, bool wide) {
  if (wide) {
    copy_async(to, from, real ? 16 : 0);
  } else {
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) to[j] = real ? from[j] : T{};
  }
}

// Positions [start, start + kTileKeys) of a head, zeros outside [first, end) and from column d on.
template <class Block, bool kWide, class T>
__device__ __forceinline__ void load_keys(T* shared, const T* head, int64_t stride, int start, int first, int end, int d) {
  const int column = threadIdx.x % Block::kVectors * kVector<T>;
  if (column >= Block::Tile::columns(d)) return;
  int position = start + threadIdx.x / Block::kVectors;
  T* to = shared + threadIdx.x / Block::kVectors * Block::Tile::kStride + column;
  const T* from = head + position * stride + column;
#pragma unroll(kWide ? kTileKeys / Block::kTogether : 1)
  for (int i = 0; i < kTileKeys; i += Block::kTogether) {
    const bool real = position >= first && position < end && column < d;
    copy_vector(to + i * Block::Tile::kStride, real ? from : head, real, kWide);
    position += Block::kTogether;
    from += Block::kTogether * stride;
  }
}

template <class T, int kMaxDim, int kRowTiles>
__global__ void __launch_bounds__(AttentionBlock<T, kMaxDim, kRowTiles>::kThreads,
                                  AttentionBlock<T, kMaxDim, kRowTiles>::kResident)
    verify_attention_kernel(AttentionLaunch a) {
  using Block = AttentionBlock<T, kMaxDim, kRowTiles>;
  using Tile = typename Block::Tile;
  LK_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(memory);
  follow_previous_kernels();
  const VerifyAttentionArgs& args = a.args;
  const int64_t b = a.first_batch + blockIdx.z, g = blockIdx.y;
  const int group = int(args.h / args.g), d = int(args.d);
  const int first_packed = int(blockIdx.x) % a.row_blocks * Block::kRows, slot_of_chunk = int(blockIdx.x) / a.row_blocks;
  const int length = args.lengths[b], queries = queries_of(args, b);
  const int stop_row = min(int(a.first_row + a.rows), queries);
  const int first_t = int(a.first_row) + first_packed / group;
  const int last_t = min(int(a.first_row) + (first_packed + Block::kRows - 1) / group, stop_row - 1);
  if (first_t >= stop_row) return;
  const RowChunks lowest = chunks_of(a, length, queries, first_t), highest = chunks_of(a, length, queries, last_t);
  // What any row sees, and what all rows see.
  const int first = lowest.view.first, end = highest.view.end;
  const int shared_first = highest.view.first, shared_end = args.tree_mask ? length : lowest.view.end;
  const auto next_chunk = [&](int size) { return first / size + ((slot_of_chunk - first / size) & (a.slots - 1)); };
  if (lowest.size == highest.size && next_chunk(lowest.size) * int64_t(lowest.size) >= end) return;

  const int64_t slot = args.slot_ids ? args.slot_ids[b] : b;
  const T* k_head = static_cast<const T*>(args.k_cache) + slot * args.k_cache_stride[0] + g * args.k_cache_stride[1];
  const T* v_head = static_cast<const T*>(args.v_cache) + slot * args.v_cache_stride[0] + g * args.v_cache_stride[1];
  const auto row_of = [&](int row) { return int(a.first_row) + (first_packed + row) / group; };
  const auto head_of = [&](int row) { return g * group + (first_packed + row) % group; };
  const auto chunks_of_row = [&](int row) {
    const int t = row_of(row);
    return t < stop_row ? chunks_of(a, length, queries, t) : RowChunks{{0, 0, 0}, 0};
  };
  // The first tile's wait and barrier are these too.
  const int column = threadIdx.x % Block::kVectors * kVector<T>;
  if (column < Tile::columns(d))
    for (int row = threadIdx.x / Block::kVectors; row < Block::kRows; row += Block::kTogether) {
      const bool real = row_of(row) < stop_row && column < d;
      const T* q = static_cast<const T*>(args.q) + b * args.q_stride[0];
      if (real) q += row_of(row) * args.q_stride[1] + head_of(row) * args.q_stride[2] + column;
      copy_vector(shared.q + row * Tile::kStride + column, q, real, a.wide_q);
    }
  if (threadIdx.x < Block::kRows) {
    const int row = threadIdx.x;
    shared.rows[row] = chunks_of_row(row);
    shared.places[row] = ((blockIdx.z * a.rows + row_of(row) - a.first_row) * args.h + head_of(row)) * a.slots_held;
    shared.bad[row] = 0;
  }
  const int warp = threadIdx.x / 32, group_of_keys = warp % kKeyGroups, row_tile = warp / kKeyGroups;
  const int first_row = row_tile * kQueryRows, first_key = group_of_keys * kWarpKeys;
  const bool busy = row_of(first_row) < stop_row;
  RowView views[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) views[i] = chunks_of_row(first_row + Tile::row_of(i)).view;
  const WindowTree tree{args.tree_mask, args.tree_mask_stride, length};

  for (int size = lowest.size; size <= highest.size; size *= 2) {
    for (int chunk = next_chunk(size); chunk * int64_t(size) < end; chunk += a.slots) {
      const int begin = max(chunk * size, first / kTileKeys * kTileKeys), stop = min((chunk + 1) * size, end);
      const auto load = [&](int start, int stage) {
        T *keys = shared.kv[stage][0], *values = shared.kv[stage][1];
        if (start < stop && a.wide) {
          load_keys<Block, true>(keys, k_head, args.k_cache_stride[2], start, first, end, d);
          load_keys<Block, true>(values, v_head, args.v_cache_stride[2], start, first, end, d);
        } else if (start < stop) {
          load_keys<Block, false>(keys, k_head, args.k_cache_stride[2], start, first, end, d);
          load_keys<Block, false>(values, v_head, args.v_cache_stride[2], start, first, end, d);
        }
        copy_async_commit();
      };
      Tile tile;
      tile.clear();
      load(begin, 0);
      int stage = 0;
      for (int start = begin; start < stop; start += kTileKeys) {
        if (Block::kStages > 1) load(start + kTileKeys, stage ^ 1);
        copy_async_wait<Block::kStages - 1>();
        __syncthreads();
        const T* keys = shared.kv[stage][0] + first_key * Tile::kStride;
        T* values = shared.kv[stage][1] + first_key * Tile::kStride;
        const bool mixed = start < shared_first || start + kTileKeys > shared_end;  // not all rows see all of the keys
        unsigned poison = 0;
        if (mixed) {
          poison = find_poison(values, Tile::kStride, Tile::columns(d));
          if constexpr (kRowTiles > 1) __syncthreads();  // both warps that share the values have looked
          if (row_tile == 0 && poison) remove_poison(values, Tile::kStride, d, poison);
          if constexpr (kRowTiles > 1) __syncthreads();
          else __syncwarp();
        }
        if (busy)
          tile.step(shared.q + first_row * Tile::kStride, keys, values, d, args.scale, start + first_key, mixed, poison, views,
                    tree, shared.scratch + warp * Tile::kScratch);
        __syncthreads();
        if (Block::kStages > 1) stage ^= 1;
        else load(start + kTileKeys, 0);
      }
      copy_async_wait<0>();
      if (busy) tile.store(shared.sums[row_tile][group_of_keys][0], shared.stats[row_tile][group_of_keys][0], d);
      __syncthreads();
      const int place_of_chunk = chunk & (a.slots - 1);
      if (threadIdx.x < Block::kRows) {
        const int row = threadIdx.x;
        const RowChunks& mine = shared.rows[row];
        // A chunk of another size, or one that the row does not see, is not the row's.
        const bool wanted = mine.size == size && chunk >= mine.view.first / size && chunk * int64_t(size) < mine.view.end;
        shared.wanted[row] = wanted;
        if (wanted) {
          const auto& stats = shared.stats[row / kQueryRows];
          float maximum = kMinusInfinity, total = 0;
#pragma unroll
          for (int w = 0; w < kKeyGroups; ++w) maximum = fmaxf(maximum, stats[w][row % kQueryRows][0]);
#pragma unroll
          for (int w = 0; w < kKeyGroups; ++w) {
            const float share = exp2f((stats[w][row % kQueryRows][0] - finite_or_zero(maximum)) * kLog2E);
            total = fmaf(share, stats[w][row % kQueryRows][1], total);
            shared.shares[w][row] = share;
          }
          float* to = a.stats + 2 * (shared.places[row] + place_of_chunk);
          to[0] = maximum, to[1] = total;
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < Block::kRows * kMaxDim; i += Block::kThreads) {
        const int row = i / kMaxDim, at = i % kMaxDim;
        if (at >= d || !shared.wanted[row]) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kKeyGroups; ++w)
          sum = fmaf(shared.shares[w][row], shared.sums[row / kQueryRows][w][row % kQueryRows][at], sum);
        a.sums[(shared.places[row] + place_of_chunk) * d + at] = sum;
        if (!is_finite(sum)) atomicAdd(&shared.bad[row], 1);
      }
      __syncthreads();
      if (threadIdx.x < Block::kRows && shared.bad[threadIdx.x]) {
        a.stats[2 * (shared.places[threadIdx.x] + place_of_chunk) + 1] = NAN;
        shared.bad[threadIdx.x] = 0;
      }
      __syncthreads();
    }
  }
}

// A block per head of a window row; rows past num_queries become zero.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_attention_kernel(AttentionLaunch a) {
  follow_previous_kernels();
  constexpr int kMost = 256;
  __shared__ float sums[kMergeWarps][kMost];
  __shared__ float totals[kMergeWarps];
  const VerifyAttentionArgs& args = a.args;
  const int64_t b = a.first_batch + blockIdx.y, head = blockIdx.x % args.h;
  const int t = int(a.first_row + blockIdx.x / args.h), d = int(args.d), queries = queries_of(args, b);
  T* out = static_cast<T*>(args.out) + b * args.out_stride[0] + t * args.out_stride[1] + head * args.out_stride[2];
  if (t >= queries) {
    for (int i = threadIdx.x; i < d; i += kMergeThreads) out[i] = T{};
    return;
  }
  const RowChunks row = chunks_of(a, args.lengths[b], queries, t);
  const int first = row.view.first / row.size, count = (row.view.end - 1) / row.size - first + 1;
  const int64_t base = ((blockIdx.y * a.rows + t - a.first_row) * args.h + head) * a.slots_held;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto at = [&](int chunk) { return base + ((first + chunk) & (a.slots - 1)); };
  float maximum = kMinusInfinity;
  for (int i = lane; i < count; i += 32) maximum = fmaxf(maximum, a.stats[2 * at(i)]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, distance));
  float sum[kMost / 32] = {}, total = 0;
#pragma unroll 2
  for (int i = warp; i < count; i += kMergeWarps) {
    const float* stats = a.stats + 2 * at(i);
    const float weight = exp2f((stats[0] - finite_or_zero(maximum)) * kLog2E);
    total = fmaf(weight, stats[1], total);
#pragma unroll
    for (int j = 0; j < kMost / 32; ++j)
      if (j * 32 + lane < d) sum[j] = fmaf(weight, a.sums[at(i) * d + j * 32 + lane], sum[j]);
  }
#pragma unroll
  for (int j = 0; j < kMost / 32; ++j)
    if (j * 32 + lane < d) sums[warp][j * 32 + lane] = sum[j];
  if (lane == 0) totals[warp] = total;
  __syncthreads();
  for (int i = threadIdx.x; i < d; i += kMergeThreads) {
    float value = sums[0][i], weight = totals[0];
#pragma unroll
    for (int w = 1; w < kMergeWarps; ++w) value += sums[w][i], weight += totals[w];
    out[i] = narrow<T>(value / weight);
  }
}

}  // namespace lk::cuda
