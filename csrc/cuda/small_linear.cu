#include "cuda/small_linear.cuh"

namespace lk::cuda {
namespace {

const void* advance(const void* rows, int64_t row, int64_t stride, DType dtype) {
  return static_cast<const char*>(rows) + row * stride * int64_t(size_of(dtype));
}

// Tokens [first, first + m) of up to kMaxWeights weights.
cudaError_t launch_pass(const SmallLinearArgs& args, int64_t first, int64_t m, const LinearWeight* weights, int count,
                        cudaStream_t stream) {
  const DType dtype = args.dtype;
  SmallLinearLaunch a{};
  a.input = {advance(args.x, first, args.x_stride, dtype), args.x_stride, int(m), int(args.c), args.norm_weight,
             args.norm_eps};
  bool wide = args.c % (kWideBytes / int64_t(size_of(dtype))) == 0 && is_wide(args.x, args.x_stride, dtype) &&
              (!args.norm_weight || is_wide(args.norm_weight, 0, dtype));
  int64_t tiles = 0;
  for (int i = 0; i < kMaxWeights; ++i) {
    a.first_tile[i] = int(tiles);
    if (i >= count) continue;
    a.weights[i] = weights[i];
    a.weights[i].out = const_cast<void*>(advance(weights[i].out, first, weights[i].out_stride, dtype));
    wide = wide && is_wide(weights[i].data, weights[i].stride, dtype);
    if (!args.swiglu || i == 0) tiles += divide_up(weights[i].n, args.swiglu ? kTileRows / 2 : kTileRows);
  }
  a.first_tile[kMaxWeights] = int(tiles);
  if (tiles == 0) return cudaSuccess;
  if (tiles > kMostTiles) return cudaErrorInvalidValue;
  if (args.residual) a.residual = advance(args.residual, first, args.residual_stride, dtype);
  a.residual_stride = args.residual_stride;
  a.swiglu = args.swiglu;
  dim3 grid;
  const cudaError_t error = linear_grid(tiles, m, &grid);
  if (error != cudaSuccess) return error;
  return for_product(dtype, m, wide, [&](auto type, auto token_tiles, auto is_wide_) {
    using T = decltype(type);
    return launch(small_linear_kernel<T, token_tiles.value, is_wide_.value>, grid, kLinearThreads, 0, stream, a);
  });
}

}  // namespace

cudaError_t small_linear(const SmallLinearArgs& args, cudaStream_t stream) {
  if ((args.norm_weight && args.m > kFusedNormRows) || args.c > kMostColumns) return cudaErrorInvalidValue;
  if (args.swiglu && (args.num_weights != 2 || args.weights[0].n != args.weights[1].n || args.residual))
    return cudaErrorInvalidValue;
  const int64_t most = tokens_per_pass(args.dtype);
  for (int64_t w = 0; w < args.num_weights; w += kMaxWeights)
    for (int64_t first = 0; first < args.m; first += most) {
      const int count = int(std::min<int64_t>(kMaxWeights, args.num_weights - w));
      const int64_t m = std::min(most, args.m - first);
      const cudaError_t error = launch_pass(args, first, m, args.weights + w, count, stream);
      if (error != cudaSuccess) return error;
    }
  return cudaSuccess;
}

}  // namespace lk::cuda
