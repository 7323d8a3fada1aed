#include "cuda/choose_token.cuh"

namespace lk::cuda {

cudaError_t exit_head(const ExitHeadArgs& args, cudaStream_t stream) {
  if (args.n == 0) return cudaSuccess;
  if ((args.norm_weight && args.n > kFusedNormRows) || args.v > 0x7fffffff || args.c > kMostColumns)
    return cudaErrorInvalidValue;
  const DType dtype = args.dtype;
  const bool wide = args.c % (kWideBytes / int64_t(size_of(dtype))) == 0 &&
                    is_wide(args.hidden, args.hidden_stride, dtype) && is_wide(args.lm_head, args.lm_head_stride, dtype) &&
                    (!args.norm_weight || is_wide(args.norm_weight, 0, dtype));
  const int64_t most = tokens_per_pass(dtype), tiles = divide_up(args.v, kTileRows);
  for (int64_t first = 0; first < args.n; first += most) {
    const int64_t m = std::min(most, args.n - first);
    const void* x = static_cast<const char*>(args.hidden) + first * args.hidden_stride * int64_t(size_of(dtype));
    const ExitHeadLaunch pass{{x, args.hidden_stride, int(m), int(args.c), args.norm_weight, args.eps}, args, first};
    dim3 grid;
    cudaError_t error = linear_grid(tiles, m, &grid);
    if (error == cudaSuccess)
      error = for_product(dtype, m, wide, [&](auto type, auto token_tiles, auto is_wide_) {
        using T = decltype(type);
        return launch(exit_head_kernel<T, token_tiles.value, is_wide_.value>, grid, kLinearThreads, 0, stream, pass);
      });
    if (error != cudaSuccess) return error;
  }
  return launch(choose_token_kernel, dim3(unsigned(args.n)), kChooseThreads, 0, stream, args);
}

}  // namespace lk::cuda
