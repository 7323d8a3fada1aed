#include "cuda/small_linear.cuh"

namespace lk::cuda {
namespace {

// Up to kMaxWeights weights.
cudaError_t launch_some(const SmallLinearArgs& args, const LinearWeight* weights, int count, cudaStream_t stream) {
  const DType dtype = args.dtype;
  SmallLinearLaunch a{};
  a.input = {args.x, args.x_stride, int(args.m), int(args.c), args.norm_weight, args.norm_eps};
  bool wide = args.c % (kWideBytes / int64_t(size_of(dtype))) == 0 && is_wide(args.x, args.x_stride, dtype) &&
              (!args.norm_weight || is_wide(args.norm_weight, 0, dtype));
  int64_t tiles = 0;
  for (int i = 0; i < kMaxWeights; ++i) {
    a.first_tile[i] = int(tiles);
    if (i >= count) continue;
    a.weights[i] = weights[i];
    wide = wide && is_wide(weights[i].data, weights[i].stride, dtype);
    if (!args.swiglu || i == 0) tiles += divide_up(weights[i].n, args.swiglu ? kTileRows / 2 : kTileRows);
  }
  a.first_tile[kMaxWeights] = int(tiles);
  if (tiles == 0) return cudaSuccess;
  if (tiles > kMostTiles) return cudaErrorInvalidValue;
  a.residual = args.residual;
  a.residual_stride = args.residual_stride;
  a.swiglu = args.swiglu;
  dim3 grid;
  const cudaError_t error = linear_grid(tiles, args.m, dtype, &grid);
  if (error != cudaSuccess) return error;
  return for_product(dtype, args.m, wide, [&](auto type, auto token_tiles, auto is_wide_) {
    using T = decltype(type);
    return launch(small_linear_kernel<T, token_tiles.value, is_wide_.value>, grid, kLinearThreads, 0, stream, a);
  });
}

}  // namespace

cudaError_t small_linear(const SmallLinearArgs& args, cudaStream_t stream) {
  if ((args.norm_weight && args.m > kFusedNormRows) || args.m > kMostRows || args.c > kMostColumns)
    return cudaErrorInvalidValue;
  if (args.swiglu && (args.num_weights != 2 || args.weights[0].n != args.weights[1].n || args.residual))
    return cudaErrorInvalidValue;
  if (args.m == 0) return cudaSuccess;
  for (int64_t w = 0; w < args.num_weights; w += kMaxWeights) {
    const int count = int(std::min<int64_t>(kMaxWeights, args.num_weights - w));
    const cudaError_t error = launch_some(args, args.weights + w, count, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lk::cuda
