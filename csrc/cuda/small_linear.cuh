// small_linear: x W^T for few tokens, one or several weights that share x in one launch (see linear_tile.cuh); a norm in
// front, bias, residual or SwiGLU behind. For SwiGLU a tile is eight rows of gate and the same eight of up.
//
// Bound by the bytes of W: n c itemsize, whatever m up to 16; 2 m n c operations (m filled up to 8). Expected on an H100
// (3.35 TB/s, 989 TFLOP/s), estimates: bf16, gate and up of an 8B model, n = 2 x 14336, c = 4096, m = 8: 235 MB,
// 3.8 GFLOP, 75 us; o of a 1B model, n = c = 2048: 8.4 MB, 4 us, of which a launch is half.
#pragma once

#include "cuda/linear_tile.cuh"
#include "cuda/swiglu.cuh"

namespace lk::cuda {

struct SmallLinearLaunch {
  LinearInput input;
  LinearWeight weights[kMaxWeights];
  int first_tile[kMaxWeights + 1];  // of each weight; then the number of tiles
  const void* residual;
  int64_t residual_stride;
  bool swiglu;  // of the first two weights
};

template <class T, int kTiles, bool kWide>
__global__ void __launch_bounds__(kLinearThreads, kTiles > 2 ? 1 : 2) small_linear_kernel(SmallLinearLaunch a) {
  const auto weight_of = [&](int tile) {
    int index = 0;
#pragma unroll
    for (int i = 1; i < kMaxWeights; ++i) index += tile >= a.first_tile[i];
    return index;
  };
  const auto rows_of = [&](int tile) {
    const int index = weight_of(tile);
    const LinearWeight &w = a.weights[index], &up = a.weights[1];
    const int64_t first = tile - a.first_tile[index];
    if (a.swiglu) return WeightTile{{w.data, w.stride, first * 8, w.n}, {up.data, up.stride, first * 8, w.n}};
    return WeightTile{{w.data, w.stride, first * 16, w.n}, {w.data, w.stride, first * 16 + 8, w.n}};
  };
  const auto finish = [&](int tile, int i, float sum) {
    const int index = weight_of(tile), place = i % kTileRows;
    const LinearWeight& w = a.weights[a.swiglu ? place / 8 : index];
    const int64_t first = tile - a.first_tile[index];
    const int64_t token = i / kTileRows, n = a.swiglu ? first * 8 + place % 8 : first * kTileRows + place;
    const bool exists = token < a.input.m && n < w.n;
    if (w.bias && exists) sum += widen(static_cast<const T*>(w.bias)[n]);
    T y = narrow<T>(sum);
    if (a.swiglu) {  // every lane takes part
      const float up = __shfl_xor_sync(kAllLanes, widen(y), 8);
      if (exists && place < 8) static_cast<T*>(w.out)[token * w.out_stride + n] = narrow<T>(swiglu(widen(y), up));
      return;
    }
    if (!exists) return;
    if (a.residual) y = narrow<T>(widen(static_cast<const T*>(a.residual)[token * a.residual_stride + n]) + widen(y));
    static_cast<T*>(w.out)[token * w.out_stride + n] = y;
  };
  for_tiles<Product<T, kTiles, kWide>, T, kWide>(a.input, a.first_tile[kMaxWeights], rows_of, finish);
}

}  // namespace lk::cuda
