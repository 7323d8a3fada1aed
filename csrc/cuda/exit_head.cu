#include "cuda/choose_token.cuh"

namespace lk::cuda {

cudaError_t exit_head(const ExitHeadArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  if ((args.norm_weight && args.n > kFusedNormRows) || args.v > 0x7fffffff || args.n > kMostRows ||
      args.c > kMostColumns)
    return cudaErrorInvalidValue;
  const DType dtype = args.dtype;
  const bool wide = args.c % (kWideBytes / int64_t(size_of(dtype))) == 0 &&
                    is_wide(args.hidden, args.hidden_stride, dtype) && is_wide(args.lm_head, args.lm_head_stride, dtype) &&
                    (!args.norm_weight || is_wide(args.norm_weight, 0, dtype));
  const int64_t tiles = divide_up(args.v, kTileRows);
  const ExitHeadLaunch pass{{args.hidden, args.hidden_stride, int(args.n), int(args.c), args.norm_weight, args.eps}, args};
  dim3 grid;
  cudaError_t error = linear_grid(tiles, args.n, dtype, &grid);
  if (error == cudaSuccess)
    error = for_product(dtype, args.n, wide, [&](auto type, auto token_tiles, auto is_wide_) {
      using T = decltype(type);
      return launch(exit_head_kernel<T, token_tiles.value, is_wide_.value>, grid, kLinearThreads, 0, stream, pass);
    });
  if (error != cudaSuccess) return error;
  return launch(choose_token_kernel, dim3(unsigned(args.n)), kChooseThreads, 0, stream, args);
}

}  // namespace lk::cuda
