// verify_attention, flash-decoding style: a block takes 16 query rows (the query heads of one KV head x rows of the window)
// and one chunk of the cache, in tiles of 64 keys, 16 per warp; a second launch merges a row's chunks. K and V come by
// cp.async, the next tile while this one is computed.
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

template <class T, int kMaxDim>
struct AttentionShared {
  using Tile = AttentionTile<T, kMaxDim>;
  // Wide rows have no second stage: two blocks on a multiprocessor overlap as well, and 99 KB hold all but float32 at 256.
  static constexpr int kStages = sizeof(T) * kMaxDim >= 512 ? 1 : 2;
  static constexpr int kKv = kTileKeys * Tile::kStride;  // elements of a tile of K, or of V
  T q[kQueryRows * Tile::kStride];
  float weights[kAttentionWarps * Tile::kScratch + 4];
  float stats[kAttentionWarps][kQueryRows][2];
  RowChunks rows[kQueryRows];
  int bad[kQueryRows];  // a sum is not finite
  union {
    T kv[kStages][2][kKv];
    float sums[kAttentionWarps][kQueryRows][kMaxDim];
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

// Positions [start, start + kTileKeys) of a head, zeros outside [first, end) and in the padding.
template <class T, int kStride, int kPadding>
__device__ __forceinline__ void load_tile(T* shared, const T* head, int64_t stride, int start, int first, int end, int d,
                                          bool wide) {
  const int vectors = (d + kPadding - 1) / kPadding * (kPadding / kVector<T>);
  for (int i = threadIdx.x; i < kTileKeys * vectors; i += kAttentionThreads) {
    const int key = i / vectors, column = i % vectors * kVector<T>, position = start + key;
    const bool real = position >= first && position < end && column < d;
    copy_vector(shared + key * kStride + column, head + (real ? position * stride + column : 0), real, wide);
  }
}

template <class T, int kMaxDim>
__global__ void __launch_bounds__(kAttentionThreads) verify_attention_kernel(AttentionLaunch a) {
  follow_previous_kernels();
  using Shared = AttentionShared<T, kMaxDim>;
  using Tile = typename Shared::Tile;
  LK_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const VerifyAttentionArgs& args = a.args;
  const int64_t b = a.first_batch + blockIdx.z, g = blockIdx.y % args.g;
  const int group = int(args.h / args.g), first_packed = int(blockIdx.y / args.g) * kQueryRows, d = int(args.d);
  const int length = args.lengths[b], queries = queries_of(args, b);
  const int stop_row = min(int(a.first_row + a.rows), queries);
  const int first_t = int(a.first_row) + first_packed / group;
  const int last_t = min(int(a.first_row) + (first_packed + kQueryRows - 1) / group, stop_row - 1);
  if (first_t >= stop_row) return;
  const RowChunks lowest = chunks_of(a, length, queries, first_t), highest = chunks_of(a, length, queries, last_t);
  // What any row sees, and what all rows see.
  const int first = lowest.view.first, end = highest.view.end;
  const int shared_first = highest.view.first, shared_end = args.tree_mask ? length : lowest.view.end;
  const auto next_chunk = [&](int size) { return first / size + ((int(blockIdx.x) - first / size) & (a.slots - 1)); };
  if (lowest.size == highest.size && next_chunk(lowest.size) * int64_t(lowest.size) >= end) return;

  const int64_t slot = args.slot_ids ? args.slot_ids[b] : b;
  const T* k_head = static_cast<const T*>(args.k_cache) + slot * args.k_cache_stride[0] + g * args.k_cache_stride[1];
  const T* v_head = static_cast<const T*>(args.v_cache) + slot * args.v_cache_stride[0] + g * args.v_cache_stride[1];
  const auto row_of = [&](int row) { return int(a.first_row) + (first_packed + row) / group; };
  const auto head_of = [&](int row) { return g * group + (first_packed + row) % group; };
  const int padded = (d + Tile::kPadding - 1) / Tile::kPadding * Tile::kPadding;
  const auto chunks_of_row = [&](int row) {
    const int t = row_of(row);
    return t < stop_row ? chunks_of(a, length, queries, t) : RowChunks{{0, 0, 0}, 0};
  };
  // The first tile's wait and barrier are these too.
  for (int i = threadIdx.x; i < kQueryRows * padded / kVector<T>; i += kAttentionThreads) {
    const int row = i * kVector<T> / padded, column = i * kVector<T> % padded;
    const bool real = row_of(row) < stop_row && column < d;
    const T* q = static_cast<const T*>(args.q) + b * args.q_stride[0];
    if (real) q += row_of(row) * args.q_stride[1] + head_of(row) * args.q_stride[2] + column;
    copy_vector(shared.q + row * Tile::kStride + column, q, real, a.wide_q);
  }
  if (threadIdx.x < kQueryRows) {
    shared.rows[threadIdx.x] = chunks_of_row(threadIdx.x);
    shared.bad[threadIdx.x] = 0;
  }
  RowView views[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) views[i] = chunks_of_row(Tile::row_of(i)).view;
  const WindowTree tree{args.tree_mask, args.tree_mask_stride, length};
  const int warp = threadIdx.x / 32;

  for (int size = lowest.size; size <= highest.size; size *= 2) {
    for (int chunk = next_chunk(size); chunk * int64_t(size) < end; chunk += a.slots) {
      const int begin = max(chunk * size, first / kTileKeys * kTileKeys), stop = min((chunk + 1) * size, end);
      const auto load = [&](int start, int stage) {
        if (start < stop) {
          load_tile<T, Tile::kStride, Tile::kPadding>(shared.kv[stage][0], k_head, args.k_cache_stride[2], start, first,
                                                      end, d, a.wide);
          load_tile<T, Tile::kStride, Tile::kPadding>(shared.kv[stage][1], v_head, args.v_cache_stride[2], start, first,
                                                      end, d, a.wide);
        }
        copy_async_commit();
      };
      Tile tile;
      tile.clear();
      load(begin, 0);
      int stage = 0;
      for (int start = begin; start < stop; start += kTileKeys) {
        if (Shared::kStages > 1) load(start + kTileKeys, stage ^ 1);
        copy_async_wait<Shared::kStages - 1>();
        __syncthreads();
        const bool mixed = start < shared_first || start + kTileKeys > shared_end;
        tile.step(shared.q, shared.kv[stage][0] + warp * kWarpKeys * Tile::kStride,
                  shared.kv[stage][1] + warp * kWarpKeys * Tile::kStride, d, args.scale, start + warp * kWarpKeys, mixed,
                  views, tree, shared.weights + warp * Tile::kScratch);
        __syncthreads();
        if (Shared::kStages > 1) stage ^= 1;
        else load(start + kTileKeys, 0);
      }
      copy_async_wait<0>();
      tile.store(shared.sums[warp][0], shared.stats[warp][0], d);
      __syncthreads();
      for (int i = threadIdx.x; i < kQueryRows * d; i += kAttentionThreads) {
        const int row = i / d, column = i % d;
        const RowChunks& mine = shared.rows[row];
        // A chunk of another size, or one that the row does not see, is not the row's.
        const bool wanted = mine.size == size && chunk >= mine.view.first / size && chunk * int64_t(size) < mine.view.end;
        if (!wanted) continue;
        float maximum = kMinusInfinity, sum = 0, total = 0;
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) maximum = fmaxf(maximum, shared.stats[w][row][0]);
#pragma unroll
        for (int w = 0; w < kAttentionWarps; ++w) {
          const float weight = exp2f((shared.stats[w][row][0] - finite_or_zero(maximum)) * kLog2E);
          sum = fmaf(weight, shared.sums[w][row][column], sum);
          total = fmaf(weight, shared.stats[w][row][1], total);
        }
        const int64_t at = ((blockIdx.z * a.rows + row_of(row) - a.first_row) * args.h + head_of(row)) * a.slots_held +
                           (chunk & (a.slots - 1));
        a.sums[at * d + column] = sum;
        if (!is_finite(sum)) atomicAdd(&shared.bad[row], 1);
        if (column == 0) a.stats[2 * at] = maximum, a.stats[2 * at + 1] = total;
      }
      __syncthreads();
      if (threadIdx.x < kQueryRows && shared.bad[threadIdx.x]) {
        const int row = threadIdx.x;
        const int64_t at = ((blockIdx.z * a.rows + row_of(row) - a.first_row) * args.h + head_of(row)) * a.slots_held +
                           (chunk & (a.slots - 1));
        a.stats[2 * at + 1] = NAN;
        shared.bad[row] = 0;
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
