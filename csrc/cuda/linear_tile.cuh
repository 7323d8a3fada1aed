// What small_linear and exit_head share: 16 rows of W times up to 64 rows of x ("tokens"), more of them in groups. Blocks of
// the same tile for all groups are neighbours, so that W comes from memory once and from the L2 cache for the others.
//
// A block of 8 warps owns a tile of 16 rows. W is the 16-row operand of mma.m16n8k16 and the tokens its 8-column operand,
// so one pass over W serves 8 tokens per mma, and more tokens are more mma on the fragments already in registers. Any
// assignment of k to an operand's places will do as long as both operands use it, so a lane feeds two mma with 8
// neighbouring elements of a row: weights and x go from memory to registers in 16-byte loads, no shared memory, no shuffles.
//
// The order of a sum: warp w takes the steps w, w + 8, ... of kStep elements, in each the same two chains of mma, one of them
// new and added to the other at the end; the block adds the warps' sums in rising order. That is a function of c and the
// dtype. The number of tokens, tiles, blocks, a list of weights, alignment and a fused norm change none of it. float32 has no
// mma that keeps its digits: a warp there takes two rows, a lane the vectors lane, lane + 32, ..., summed with FMA and over
// the lanes by shuffles.
//
// Little's law on an H100: 3.35 TB/s x 0.8 us = 2.7 MB under way, 20 KB per multiprocessor. Here each warp has two steps
// (of kDepth x 1 KB) under way when it waits for the first, across tile boundaries too: 8 warps x 8 KB = 64 KB per block. The
// first two are asked for before the kernel in front has ended (see launch()).
#pragma once

#include <algorithm>

#include "cuda/rms_norm.cuh"

namespace lk::cuda {

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = 32 * kLinearWarps;
constexpr int kTileTokens = 8;  // of one mma, whose other operand are kTileRows of W
constexpr int kMaxTokens = 64;  // of one pass over W
constexpr int kChunk = 32;      // elements that the four lanes of a row load at once
constexpr int kDepth = 4;       // chunks in a step
constexpr int kStep = kChunk * kDepth;
constexpr int64_t kMostTiles = 1 << 30, kMostColumns = 1 << 30, kMostRows = 1 << 26;  // of what an int counts
constexpr int kSumStride = kTileRows + 4;  // floats between tokens: no bank conflicts

struct LinearInput {
  const void* x;  // [m, c]
  int64_t x_stride;
  int m, c;
  const void* norm_weight;  // [c] or null; m <= kFusedNormRows with it
  float norm_eps;
};

struct WeightRows {  // eight rows of a matrix from `first` on, those from `end` on in name only
  const void* data;
  int64_t stride, first, end;
};

struct WeightTile {  // rows 0 to 7 and 8 to 15 of a tile
  WeightRows upper, lower;
};

template <class T>
__device__ __forceinline__ const T* row_of(const WeightRows& w, int row) {
  return static_cast<const T*>(w.data) + min(w.first + row, w.end - 1) * w.stride;
}

// 16 bytes of a row of c elements, zeros behind its end.
template <class T, bool kWide>
__device__ __forceinline__ uint4 load_elements(const T* row, int k, int c) {
  if constexpr (kWide) {
    return load_whole(row, k, c);
  } else {
    Elements<T> elements;
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) elements.at[j] = k + j < c ? row[k + j] : T{};
    return elements.wide;
  }
}

// The same of a row of W.
template <class T, bool kWide>
__device__ __forceinline__ uint4 load_weights(const T* row, int k, int c) {
  if constexpr (kWide) return k < c ? load_stream(row + k) : make_uint4(0, 0, 0, 0);
  else return load_elements<T, false>(row, k, c);
}

template <class T, int kTiles, bool kWide>
struct HalfProduct {
  static constexpr int kTokens = kTiles * kTileTokens;
  static constexpr bool kGroups = kTokens == kMaxTokens;
  static constexpr int kSums = kLinearWarps;  // of each output, to be added in order
  static constexpr int kTogether = kTiles == 2 ? kDepth / 2 : kDepth;  // loads of x; registers are scarce at two tiles

  struct Step {
    uint4 upper[kDepth], lower[kDepth];  // rows lane / 4 and lane / 4 + 8 of the tile
  };
  float sums[kTiles][4];

  static __device__ __forceinline__ int steps(int c) {
    return (c + kLinearWarps * kStep - 1) / (kLinearWarps * kStep);
  }

  static __device__ __forceinline__ int first_element(int step) {
    return (step * kLinearWarps + int(threadIdx.x) / 32) * kStep + int(threadIdx.x) % 4 * 8;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
  }

  static __device__ __forceinline__ void load(Step& step, const WeightTile& w, int index, int c) {
    const int row = threadIdx.x % 32 / 4;
    const T *upper = row_of<T>(w.upper, row), *lower = row_of<T>(w.lower, row);
    const int k = first_element(index);
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      step.upper[i] = load_weights<T, kWide>(upper, k + i * kChunk, c);
      step.lower[i] = load_weights<T, kWide>(lower, k + i * kChunk, c);
    }
  }

  // Eight elements of a token, normed like rms_norm_kernel does it.
  static __device__ __forceinline__ uint4 norm(uint4 x, uint4 weight, float scale) {
    Elements<T> v{x}, w{weight};
#pragma unroll
    for (int j = 0; j < 8; ++j) v.at[j] = narrow<T>(widen(v.at[j]) * scale * widen(w.at[j]));
    return v.wide;
  }

  __device__ __forceinline__ void multiply(const Step& step, const LinearInput& a, int index, const float* scales) {
    const int k = first_element(index);
    const int token = threadIdx.x % 32 / 4;
    if (k - int(threadIdx.x) % 4 * 8 >= a.c) return;  // the whole warp: nothing but zeros follows
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = tile * kTileTokens + token;
      if (tile * kTileTokens >= a.m) break;
      const T* x_row = static_cast<const T*>(a.x) + min(row, a.m - 1) * a.x_stride;
      float others[4] = {};  // two chains of mma, since each waits for the one before in its chain
      // Asked for together, before the first is needed. What there is for rows from m on, nobody looks at.
#pragma unroll
      for (int first = 0; first < kDepth; first += kTogether) {
        uint4 x[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) x[i] = load_elements<T, kWide>(x_row, k + (first + i) * kChunk, a.c);
        if (a.norm_weight) {
          const T* weight = static_cast<const T*>(a.norm_weight);
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            x[i] = norm(x[i], load_elements<T, kWide>(weight, k + (first + i) * kChunk, a.c), scales[row]);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const uint4 upper = step.upper[first + i], lower = step.lower[first + i];
          mma<T>(sums[tile], {upper.x, lower.x, upper.y, lower.y}, {x[i].x, x[i].y});
          mma<T>(others, {upper.z, lower.z, upper.w, lower.w}, {x[i].z, x[i].w});
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[tile][j] += others[j];
    }
  }

  // shared: [kSums][kTokens][kSumStride]
  __device__ __forceinline__ void store(float* shared) const {
    const int lane = threadIdx.x % 32;
    float* mine = shared + threadIdx.x / 32 * (kTokens * kSumStride) + lane % 4 * 2 * kSumStride + lane / 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mine[(tile * kTileTokens + j % 2) * kSumStride + j / 2 * 8] = sums[tile][j];
  }
};

template <bool kWide>
struct FloatProduct {
  static constexpr int kTokens = kTileTokens;
  static constexpr bool kGroups = true;
  static constexpr int kSums = 1;
  static constexpr int kRows = kTileRows / kLinearWarps;
  static constexpr int kFloatStep = 2 * 32 * 4;

  struct Step {
    Elements<float> w[kRows][2];
  };
  float sums[kRows][kTokens];

  static __device__ __forceinline__ int steps(int c) { return (c + kFloatStep - 1) / kFloatStep; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kTokens; ++j) sums[i][j] = 0;
  }

  static __device__ __forceinline__ void load(Step& step, const WeightTile& w, int index, int c) {
    const int first = threadIdx.x / 32 * kRows;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float* row = row_of<float>(first < 8 ? w.upper : w.lower, first % 8 + i);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        step.w[i][j].wide = load_weights<float, kWide>(row, index * kFloatStep + j * 128 + int(threadIdx.x) % 32 * 4, c);
    }
  }

  __device__ __forceinline__ void multiply(const Step& step, const LinearInput& a, int index, const float* scales) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int k = index * kFloatStep + j * 128 + int(threadIdx.x) % 32 * 4;
      Elements<float> weight, x;
      if (a.norm_weight) weight.wide = load_elements<float, kWide>(static_cast<const float*>(a.norm_weight), k, a.c);
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        if (token >= a.m) break;
        x.wide = load_elements<float, kWide>(static_cast<const float*>(a.x) + token * a.x_stride, k, a.c);
        if (a.norm_weight)
#pragma unroll
          for (int e = 0; e < 4; ++e) x.at[e] = x.at[e] * scales[token] * weight.at[e];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][token] = fmaf(step.w[i][j].at[e], x.at[e], sums[i][token]);
      }
    }
  }

  __device__ __forceinline__ void store(float* shared) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int token = 0; token < kTokens; ++token) {
        const float sum = warp_sum(sums[i][token]);
        if (threadIdx.x % 32 == 0) shared[token * kSumStride + threadIdx.x / 32 * kRows + i] = sum;
      }
  }
};

template <class T, int kTiles, bool kWide>
using Product = std::conditional_t<std::is_same_v<T, float>, FloatProduct<kWide>, HalfProduct<T, kTiles, kWide>>;

// Goes over the block's tiles: rows_of(tile) is the WeightTile, and finish(tile, i, sum) is called by all threads with
// i = 16 token + row of the tile, sum only valid where token < m.
template <class P, class T, bool kWide, class RowsOf, class Finish>
__device__ __forceinline__ void for_tiles(const LinearInput& input, int tiles, RowsOf rows_of, Finish finish) {
  LinearInput a = input;
  int first_token = 0, stride = int(gridDim.x), tile = int(blockIdx.x);
  if constexpr (P::kGroups) {
    const int groups = (a.m + P::kTokens - 1) / P::kTokens;
    first_token = tile % groups * P::kTokens;
    a.x = static_cast<const T*>(a.x) + first_token * a.x_stride;
    a.m = min(a.m - first_token, P::kTokens);
    tile /= groups;
    stride /= groups;
  }
  __shared__ float shared[P::kSums * P::kTokens * kSumStride];
  __shared__ float scales[kFusedNormRows];
  const int steps = P::steps(a.c);
  int ahead = tile, ahead_step = 0;
  const auto load_ahead = [&](typename P::Step& step) {
    if (ahead < tiles) P::load(step, rows_of(ahead), ahead_step, a.c);
    if (++ahead_step == steps) ahead_step = 0, ahead += stride;
  };
  typename P::Step now, next;
  allow_next_kernel();
  load_ahead(now);
  load_ahead(next);
  wait_for_previous_kernels();
  if (a.norm_weight) {  // the first weights are on their way
    for (int row = threadIdx.x / 32; row < a.m; row += kLinearWarps) {
      const float scale = inverse_rms(static_cast<const T*>(a.x) + row * a.x_stride, a.c, a.norm_eps, kWide);
      if (threadIdx.x % 32 == 0) scales[row] = scale;
    }
    __syncthreads();
  }
  for (; tile < tiles; tile += stride) {
    P product;
    product.clear();
    for (int step = 0; step < steps; ++step) {
      product.multiply(now, a, step, scales);
      now = next;
      load_ahead(next);
    }
    product.store(shared);
    __syncthreads();
    for (int first = 0; first < a.m * kTileRows; first += kLinearThreads) {
      const int i = first + threadIdx.x, place = i / kTileRows * kSumStride + i % kTileRows;
      float sum = 0;
      if (i < a.m * kTileRows) {
        sum = shared[place];
#pragma unroll
        for (int w = 1; w < P::kSums; ++w) sum += shared[w * (P::kTokens * kSumStride) + place];
      }
      // Threads behind the group's tokens take part in shuffles alone: the next tokens are another block's.
      finish(tile, (i < a.m * kTileRows ? first_token : input.m) * kTileRows + i, sum);
    }
    __syncthreads();
  }
}

// call(T{}, tiles of tokens, wide): the instance for m rows, which decides no sum. Unaligned rows are slow, and have one.
template <class Call>
cudaError_t for_product(DType dtype, int64_t m, bool wide, Call call) {
  return for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    using Yes = std::true_type;
    using No = std::false_type;
    if constexpr (std::is_same_v<T, float>) {
      return wide ? call(type, std::integral_constant<int, 1>{}, Yes{}) : call(type, std::integral_constant<int, 1>{}, No{});
    } else {
      if (!wide) return call(type, std::integral_constant<int, 8>{}, No{});
      if (m <= 8) return call(type, std::integral_constant<int, 1>{}, Yes{});
      if (m <= 16) return call(type, std::integral_constant<int, 2>{}, Yes{});
      return call(type, std::integral_constant<int, 8>{}, Yes{});
    }
  });
}

// Blocks of a launch: at most as many as are resident at once, the same number for each group of tokens.
inline cudaError_t linear_grid(int64_t tiles, int64_t m, DType dtype, dim3* grid) {
  const int64_t tokens = dtype == DType::f32 ? kTileTokens : kMaxTokens;
  const int64_t groups = divide_up(m, tokens), resident = m <= 16 || dtype == DType::f32 ? 2 : 1;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *grid = dim3(unsigned(groups * std::max<int64_t>(1, std::min(tiles, processors * resident / groups))));
  return error;
}

}  // namespace lk::cuda
